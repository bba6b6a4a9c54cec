"""`python -m infra.llama_cpp`: llama.cpp's converter and libraries for this Python, from one pinned, hashed sdist.

pip downloads the sdist of llama-cpp-python, refuses it unless its sha256 is the pinned one, and builds it. The wheel
and the converter, which the sdist has too, are kept under `~/.cache/gemma-export/llama-cpp` (`XDG_CACHE_HOME` moves it)
for the next environment. Nothing but the standard library is imported: this runs before anything else is installed.
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from exporter.llama_cpp import DISTRIBUTION, ORIGIN, PLACE, installed_version, read_origin


@dataclass(frozen=True)
class Release:
    """One release of llama-cpp-python."""

    version: str
    sha256: str
    """Of its sdist, in hex"""


# pyproject.toml names the version too, for pip; a test holds the two together.
PINNED = Release("0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")

# For every CPU of its kind with AVX2, not for this very one: what is built here may run elsewhere. Without mtmd, which
# nothing here uses and `import llama_cpp` does not load.
CMAKE_ARGS = "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"

# The sdist's CMakeLists.txt also builds the library of llama.cpp's command line tools, nearly half of the work, which
# nothing here loads. It forces the cache entry of this variable ON; a plain variable goes before a cache entry.
# https://cmake.org/cmake/help/latest/variable/CMAKE_PROJECT_PROJECT-NAME_INCLUDE.html
PROJECT_INCLUDE = "set(LLAMA_BUILD_COMMON OFF)\n"

# Of vendor/llama.cpp in the sdist.
CONVERTER = ("LICENSE", "convert_hf_to_gguf.py", "conversion", "gguf-py/LICENSE", "gguf-py/gguf")

_COMPILERS = (("C", "CC", ("cc", "gcc", "clang")), ("C++", "CXX", ("c++", "g++", "clang++")))
_LAST_LINES = 25
_END_SECONDS = 10


class SetUpError(Exception):
    """llama.cpp could not be set up; the message says why, and what to do."""


def main(release: Release = PINNED) -> int:
    """Set up a release; 1 where that fails."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        set_up(release)
    except (SetUpError, OSError) as error:
        sys.stderr.write(f"setup: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def set_up(release: Release) -> None:
    """Install a release into this Python's environment, and its converter beside it, unless both are there already.

    `CMAKE_ARGS` of the environment is added after our own, so it wins (`-DGGML_CUDA=ON`, or what conda's compilers
    need), and makes another build.

    Raises:
        SetUpError: No compiler; pip could not download it, or not with this hash; it could not be built or installed.
    """
    cmake_args = f"{CMAKE_ARGS} {os.environ.get('CMAKE_ARGS', '')}".strip()
    origin = {"llama_cpp_python": release.version, "sha256": release.sha256, "cmake_args": cmake_args}
    if _is_in_place(origin):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-export" / "llama-cpp"
    cache.mkdir(parents=True, exist_ok=True)
    with _alone_in(cache):
        if _is_in_place(origin):  # by the one that was waited for
            return
        built = cache / _key(origin)
        if not any(built.glob("*.whl")):  # what cleans caches may have left the directory
            shutil.rmtree(built, ignore_errors=True)
            _build(release, cmake_args, built)
        _install(built, origin, cache)
    _say(f"llama.cpp of {DISTRIBUTION} {release.version} is in place")


def copy_converter(sdist: Path, directory: Path) -> None:
    """Copy the converter's files out of an sdist, nothing else, into a new directory.

    Raises:
        SetUpError: One of them is no plain file, or would lie elsewhere; or there is no converter.
    """
    wanted = [PurePosixPath(name) for name in CONVERTER]
    with tarfile.open(sdist) as archive:
        for member in archive:
            # {name}-{version}/vendor/llama.cpp/…
            inside = PurePosixPath(member.name).parts[1:]
            path = PurePosixPath(*inside[2:])
            if inside[:2] != ("vendor", "llama.cpp") or not any(path.is_relative_to(name) for name in wanted):
                continue
            if member.isdir():
                continue
            # Only bytes are taken, never a link, a mode or an owner: extraction filters are not in every Python 3.11.
            source = archive.extractfile(member) if member.isfile() and ".." not in path.parts else None
            if source is None:
                raise SetUpError(f"{sdist.name} has {member.name}, which is no plain file under vendor/llama.cpp.")
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("xb") as file:
                shutil.copyfileobj(source, file)
    missing = [name for name in CONVERTER if not (directory / name).exists()]
    if missing:
        raise SetUpError(f"{sdist.name} has no vendor/llama.cpp/{missing[0]}.")


def _is_in_place(origin: Mapping[str, str]) -> bool:
    return installed_version() == origin["llama_cpp_python"] and read_origin(Path(sys.prefix) / PLACE) == origin


def _key(origin: Mapping[str, str]) -> str:
    """The name of a build: what it was made from, and what it runs on."""
    runs_on = [sys.implementation.cache_tag, sysconfig.get_platform(), *platform.libc_ver()]
    digest = hashlib.sha256(json.dumps([*origin.values(), PROJECT_INCLUDE, *runs_on]).encode()).hexdigest()
    return f"{origin['llama_cpp_python']}-{digest[:16]}"


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """One set-up at a time: two builds at once would take twice as long, two installations break the environment."""
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another set-up of llama.cpp")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob("*.part"):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


def _build(release: Release, cmake_args: str, built: Path) -> None:
    """Download, check, unpack and build, in a directory that gets its name when all is there."""
    _require_compilers()
    log = built.parent / "build.log"
    with tempfile.TemporaryDirectory(dir=built.parent, suffix=".part") as temporary:
        part, scratch = Path(temporary, "whole"), Path(temporary, "tmp")
        part.mkdir()
        scratch.mkdir()
        include = Path(temporary, "project.cmake")
        include.write_text(PROJECT_INCLUDE)
        arguments = f"{shlex.quote(f'-DCMAKE_PROJECT_llama_cpp_INCLUDE={include}')} {cmake_args}"
        # pip's own temporary files too, so that a killed build's are found and removed by the next.
        environment = {**os.environ, "TMPDIR": str(scratch), "CMAKE_ARGS": arguments}
        check = f"--hash=sha256:{release.sha256}\n"

        _say(f"downloading {DISTRIBUTION} {release.version}")
        requirements = Path(temporary, "download.txt")
        requirements.write_text(f"{DISTRIBUTION}=={release.version} {check}")
        downloads = Path(temporary, "sdist")
        options = ["--no-binary", DISTRIBUTION, "--require-hashes", "-r", str(requirements), "-d", str(downloads)]
        if not _pip(["download", "--no-deps", *options], environment, log):
            _fail(f"pip could not download {DISTRIBUTION} {release.version} with sha256 {release.sha256}", log)
        (sdist,) = downloads.iterdir()
        copy_converter(sdist, part / "llama.cpp")

        _say("building llama.cpp (once; about 4 minutes)")
        requirements.write_text(f"{DISTRIBUTION} @ {sdist.as_uri()} {check}")
        # pip's cache could hold a wheel that was built with other arguments.
        options = ["--no-cache-dir", "--require-hashes", "-r", str(requirements), "-w", str(part)]
        if not _pip(["wheel", "--no-deps", *options], environment, log):
            _fail("llama.cpp could not be built: it needs a C++17 compiler, and pip has to get cmake and ninja", log)
        part.rename(built)
    log.unlink()


def _install(built: Path, origin: Mapping[str, str], cache: Path) -> None:
    """Install the wheel, then put the converter where it belongs, as a whole."""
    place = Path(sys.prefix) / PLACE
    (place / ORIGIN).unlink(missing_ok=True)  # from here on, what lies there is not whole
    (wheel,) = built.glob("*.whl")
    log = cache / "install.log"
    # A build of the same version may be there already, with other arguments or from elsewhere.
    if not _pip(["install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)], os.environ, log):
        _fail(f"pip could not install what was built; if that is damaged, remove {built}", log)
    log.unlink()
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(built / "llama.cpp", part)
    (part / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)


def _require_compilers() -> None:
    for language, variable, usual in _COMPILERS:
        named = shlex.split(os.environ.get(variable, ""))[:1]
        if not any(shutil.which(compiler) for compiler in named or usual):
            raise SetUpError(
                f"llama.cpp needs a {language} compiler, and there is no {' or '.join(named or usual)} (${variable}). "
                "Install one: `apt-get install build-essential`, `dnf install gcc gcc-c++`, `xcode-select --install`."
            )


def _pip(arguments: list[str], environment: Mapping[str, str], log: Path) -> bool:
    """Run this environment's pip, its output to a log; whether it did what was asked."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    # In a session of its own, so that an interrupted set-up ends the compilers too.
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        ) as pip,
    ):
        try:
            return pip.wait() == 0
        except BaseException:
            _end(pip)
            raise


def _end(pip: subprocess.Popen[bytes]) -> None:
    """End pip and all that it started, before what they write to is removed.

    Asked first: ninja keeps compilers in process groups of their own, which only ninja knows of.
    """
    deadline = time.monotonic() + _END_SECONDS
    with suppress(ProcessLookupError):  # when none of the group is left
        os.killpg(pip.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            pip.poll()  # a child that nobody asks after stays in the group
            os.killpg(pip.pid, 0)
            time.sleep(0.05)
        os.killpg(pip.pid, signal.SIGKILL)


def _fail(message: str, log: Path) -> NoReturn:
    lines = log.read_text(errors="replace").rstrip().splitlines()[-_LAST_LINES:]
    raise SetUpError("\n".join([f"{message}. The end of {log}:", *(f"  {line}" for line in lines)]))


def _say(line: str) -> None:
    sys.stdout.write(f"setup: {line}\n")
    sys.stdout.flush()


def _terminated(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
