"""The images' locks say what pyproject.toml says, with hashes, and each what its image may hold."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from infra.locks import LLAMA_CPP, LOCKS, ROOT, Entry, Lock, check, entries

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD, DISPATCHER, CPU, GPU = LOCKS
every_lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.path)


def locked(lock: Lock) -> list[Entry]:
    return list(entries((ROOT / lock.path).read_text()))


def names(lock: Lock) -> set[str]:
    return {entry.name for entry in locked(lock)}


def pins(requirements: list[str]) -> dict[str, str]:
    """Names as a lock writes them, without extras and markers, and versions."""
    found = (pin.partition(";")[0].strip().partition("==") for pin in requirements)
    return {name.partition("[")[0]: version for name, _, version in found}


@every_lock
def test_a_lock_is_current(lock: Lock) -> None:
    assert check(lock) == []


@every_lock
def test_each_direct_pin_is_in_the_lock_in_the_same_version(lock: Lock) -> None:
    wanted = {name: version for name, version in pins(lock.requirements(PROJECT)).items() if not lock.leaves_out(name)}
    found = {entry.name: entry.version for entry in locked(lock)}
    assert wanted
    assert {name: found.get(name) for name in wanted} == wanted


@every_lock
def test_everything_has_a_version_and_hashes_and_no_address(lock: Lock) -> None:
    for entry in locked(lock):
        assert entry.version
        assert entry.hashes, entry.name
        assert all(len(one) == len("sha256:") + 64 and one.startswith("sha256:") for one in entry.hashes), entry.name
    text = (ROOT / lock.path).read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


@every_lock
def test_what_other_steps_install_is_in_no_lock(lock: Lock) -> None:
    """torch and its CUDA have builds by machine; llama.cpp is built from an sdist."""
    others = {name for name in names(lock) if name in ("torch", LLAMA_CPP) or name.startswith(("nvidia-", "cuda-"))}
    assert others == set()
    assert "triton" not in names(CPU)


def test_only_the_gpu_image_has_unsloth() -> None:
    extra = pins(PROJECT["project"]["optional-dependencies"]["unsloth"])
    assert set(extra) <= names(GPU)
    assert not set(extra) & (names(CPU) | names(DISPATCHER))


def test_the_dispatcher_has_nothing_of_the_exporters() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    # Flask, Google's clients and pydantic need these too.
    theirs = {*pins(extras["exporter"]), *pins(extras["gguf"])} - {"jinja2", "protobuf", "typing-extensions"}
    assert {"torch", "transformers", "numpy"} <= theirs
    assert not theirs & names(DISPATCHER)


def test_the_exporter_has_all_of_the_base_dependencies() -> None:
    base = set(pins(PROJECT["project"]["dependencies"]))
    assert base <= names(DISPATCHER)
    assert base <= names(CPU)
    assert base <= names(GPU)


def test_a_lock_is_not_current_when_a_pin_has_changed(tmp_path: Path) -> None:
    copy(tmp_path)
    text = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace("click==8.5.1", "click==8.5.2"))
    assert [lock for lock in LOCKS if check(lock, tmp_path)] == [DISPATCHER, CPU, GPU]


def test_a_lock_is_not_current_when_its_lines_were_edited_or_it_is_gone(tmp_path: Path) -> None:
    copy(tmp_path)
    path = tmp_path / BUILD.path
    path.write_text(path.read_text().replace("packaging==", "packaging==9"))
    assert "edited" in check(BUILD, tmp_path)[0]
    path.unlink()
    assert "missing" in check(BUILD, tmp_path)[0]


def test_nothing_but_the_standard_library_is_imported() -> None:
    """Where images are tried there may be nothing else yet."""
    program = "import sys; sys.path.append(sys.argv[1]); import infra.locks, infra.images"
    subprocess.run([sys.executable, "-I", "-S", "-c", program, str(ROOT)], check=True, timeout=60)


def copy(to: Path) -> None:
    """The project's pins and locks, at another place."""
    for name in ("pyproject.toml", *(lock.path for lock in LOCKS)):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)
