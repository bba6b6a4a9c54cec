"""`python -m infra.locks`: writes what the images install, each pinned and hashed, from the pins of pyproject.toml.

`--check` needs no network: each lock names the digest of what it was made from, and that of its own lines.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIRST_PYTHON = "3.11"
"""The oldest that the images have: the slim image's. Ubuntu 24.04, under the CUDA image, has 3.12."""
_RUNS_ON = ("python_full_version < '3.13'", "sys_platform == 'linux'")
"""Nothing else is resolved for: of Unsloth's packages a third is for macOS and Windows."""
TORCH = ("torch", "nvidia-", "cuda-")
"""What the step before the lock installs: builds of torch differ by machine, and bring their own CUDA."""
LLAMA_CPP = "llama-cpp-python"
"""Has no wheel; `infra.llama_cpp` builds it from an sdist whose hash it knows."""
_SECONDS = 600


@dataclass(frozen=True)
class Lock:
    """A lock, and what it is made from."""

    path: str
    extras: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Names of distributions, or beginnings of names, which end with a dash."""
    build: bool = False
    """Whether it is for what builds the project, and not for what the project needs."""

    def requirements(self, project: Mapping[str, Any]) -> list[str]:
        """The direct pins in a pyproject.toml, but llama-cpp-python."""
        if self.build:
            return sorted(project["build-system"]["requires"])
        extras = project["project"]["optional-dependencies"]
        wanted = [*project["project"]["dependencies"], *(pin for extra in self.extras for pin in extras[extra])]
        return sorted(pin for pin in wanted if not pin.startswith(f"{LLAMA_CPP}=="))

    def leaves_out(self, name: str) -> bool:
        """Whether a distribution of this name is another step's."""
        return any(name == left or (left.endswith("-") and name.startswith(left)) for left in self.left_out)


LOCKS = (
    Lock("infra/build.lock", build=True),
    Lock("dispatcher/requirements.lock"),
    # triton is what torch's CUDA build brings, and nothing else here asks for.
    Lock("exporter/requirements-cpu.lock", ("exporter", "gguf"), (*TORCH, "triton")),
    Lock("exporter/requirements-gpu.lock", ("exporter", "gguf", "unsloth"), TORCH),
)


@dataclass(frozen=True)
class Entry:
    """One distribution in a lock."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


class LockError(Exception):
    """A lock could not be made; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the locks, or say whether they are current; 1 where they are not."""
    parser = argparse.ArgumentParser(prog="python -m infra.locks", description="The images' locks, by pyproject.toml.")
    parser.add_argument("--check", action="store_true", help="only say whether they are current; needs no network")
    parser.add_argument("--upgrade", action="store_true", help="take the newest of what is not pinned directly")
    args = parser.parse_args(arguments)
    if args.check:
        faults = [fault for lock in LOCKS for fault in check(lock)]
        sys.stdout.write("".join(f"{fault}\n" for fault in faults) or "the locks are current\n")
        return int(bool(faults))
    try:
        for lock in LOCKS:
            text = resolved(lock, upgrade=args.upgrade)
            (ROOT / lock.path).write_text(text)
            sys.stdout.write(f"{lock.path}: {len(list(entries(text)))} packages\n")
    except (LockError, OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"locks: {error}\n")
        return 1
    return 0


def check(lock: Lock, root: Path = ROOT) -> list[str]:
    """What is wrong with a lock: nothing, or one sentence."""
    path = root / lock.path
    if not path.exists():
        return [f"{lock.path} is missing: run python -m infra.locks"]
    head, body = _parted(path.read_text())
    if head != _header(lock, root, body):
        return [f"{lock.path} is not of this pyproject.toml, or was edited: run python -m infra.locks"]
    return []


def resolved(lock: Lock, *, upgrade: bool = False, root: Path = ROOT) -> str:
    """A lock's new text; what an existing one pins is kept where it still fits.

    Raises:
        LockError: There is no uv, it found no solution, or it names an index.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, output = Path(temporary, "pyproject.toml"), Path(temporary, "lock")
        # No workspace but this, and of the environments only those that the images are.
        source.write_text(
            f'[project]\nname = "gemma-export"\nversion = "0"\nrequires-python = ">={FIRST_PYTHON}"\n'
            f"dependencies = {json.dumps(lock.requirements(_project(root)))}\n"
            f"[tool.uv]\nenvironments = {json.dumps([' and '.join(_RUNS_ON)])}\n"
        )
        if not upgrade and (root / lock.path).exists():
            shutil.copyfile(root / lock.path, output)
        options = ["--universal", "--python-version", FIRST_PYTHON, "--no-build", "--generate-hashes", "--no-header"]
        command = [_uv(), "pip", "compile", source.name, *options, "--quiet", "--output-file", output.name]
        done = subprocess.run(
            command,
            cwd=temporary,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise LockError(f"{lock.path}: uv says: {done.stderr.strip()}")
        body = "".join(_tidied(block) for block in _blocks(output.read_text()) if not lock.leaves_out(_name(block[0])))
    if "://" in body:
        raise LockError(f"{lock.path}: uv names an index, or takes a package from elsewhere")
    return _header(lock, root, body) + body


def entries(text: str) -> Iterator[Entry]:
    """The distributions in a lock's text."""
    for block in _blocks(text):
        pin, _, marker = block[0].removesuffix("\\").partition(";")
        name, _, version = pin.strip().partition("==")
        hashes = (line.strip().removesuffix("\\").strip() for line in block[1:])
        found = tuple(line.removeprefix("--hash=") for line in hashes if line.startswith("--hash="))
        yield Entry(name, version, marker.strip(), found)


def _project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def _header(lock: Lock, root: Path, body: str) -> str:
    made_from = [lock.requirements(_project(root)), lock.left_out, FIRST_PYTHON, _RUNS_ON]
    what = "what builds the project" if lock.build else ", ".join(["dependencies", *(f"[{e}]" for e in lock.extras)])
    left_out = ", ".join(f"{name}*" if name.endswith("-") else name for name in lock.left_out)
    return (
        f"# Made by `python -m infra.locks` of pyproject.toml: {what}{f', without {left_out}' if left_out else ''}.\n"
        f"# made from sha256:{_digest(json.dumps(made_from))}\n"
        f"# lines sha256:{_digest(body)}\n"
    )


def _parted(text: str) -> tuple[str, str]:
    lines = text.splitlines(keepends=True)
    return "".join(lines[:3]), "".join(lines[3:])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _blocks(text: str) -> Iterator[list[str]]:
    """Each distribution's lines: the pin first, then its hashes, then for whom it is there."""
    block: list[str] = []
    for line in text.splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            if block:
                yield block
            block = [line]
        elif block:
            block.append(line)
    if block:
        yield block


def _name(pin: str) -> str:
    return pin.partition("==")[0].strip()


def _tidied(block: Iterable[str]) -> str:
    """A block without the part of its marker that is the same for all."""
    first, *others = block
    pin, separator, marker = first.removesuffix("\\").partition(" ; ")
    if separator and " or " not in marker:
        kept = " and ".join(clause for clause in marker.strip().split(" and ") if clause not in _RUNS_ON)
        end = " \\" if first.endswith("\\") else ""
        first = f"{pin.strip()}{f' ; {kept}' if kept else ''}{end}"
    return "".join(f"{line}\n" for line in (first, *others))


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise LockError("there is no uv: pip install -e '.[locks]'")
    return found


if __name__ == "__main__":
    sys.exit(main())
