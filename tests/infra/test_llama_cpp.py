"""Setting up llama.cpp: real environments, a real pip, and an sdist that builds in a second."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

from infra.llama_cpp import PINNED, Release, SetUpError, copy_converter
from tests.infra.sdists import CONVERTER, release_of, write_sdist
from tests.waiting import until

ROOT = Path(__file__).parents[2]
VERSION = "0.0.1"
OURS = "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
SET_UP = "import sys; from infra.llama_cpp import Release, main; sys.exit(main(Release(*sys.argv[1:])))"
FIND = "from exporter.llama_cpp import *; print(home()); print(library('libggml-base'))"


class Machine:
    """Python environments that share a cache, and the only sdist that their pip finds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache" / "gemma-export" / "llama-cpp"
        self.sdist = write_sdist(root / "index", VERSION)
        self.release = release_of(self.sdist, VERSION)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "CMAKE_"))},
            "BUILDS": str(root / "builds"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": str(root / "index"),
            "PIP_NO_INDEX": "1",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(root / "cache"),
        }

    def make(self, name: str) -> Path:
        """A new environment with pip, which takes no second."""
        venv.create(self.root / name, symlinks=True)
        pip = find_spec("pip")
        assert pip is not None
        assert pip.origin is not None
        place = sysconfig.get_path("purelib", "venv", {"base": str(self.root / name)})
        shutil.copytree(Path(pip.origin).parent, Path(place) / "pip")
        return self.root / name

    def start(self, place: Path, *, release: Release | None = None, **environment: str) -> subprocess.Popen[str]:
        release = release or self.release
        return subprocess.Popen(
            [place / "bin" / "python", "-c", SET_UP, release.version, release.sha256],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, place: Path, *, release: Release | None = None, **environment: str) -> tuple[int, str, str]:
        with self.start(place, release=release, **environment) as process:
            said, errors = process.communicate(timeout=120)
        return process.returncode, said, errors

    def builds(self) -> list[str]:
        path = self.root / "builds"
        return path.read_text().splitlines() if path.exists() else []

    def cached(self) -> list[str]:
        """What the cache holds: its lock aside, builds and logs."""
        return sorted(path.name for path in self.cache.iterdir() if path.name != "lock")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One with an environment, `env`, that is set up; tests leave it so, and build nothing by the same arguments."""
    machine = Machine(tmp_path_factory.mktemp("ready"))
    code, said, errors = machine.run(machine.make("env"))
    assert (code, errors) == (0, "")
    assert "setup: building llama.cpp" in said
    return machine


def installed(place: Path) -> list[str]:
    """What lies in an environment that a set-up puts there."""
    found = [*place.glob("share/gemma-export/llama.cpp*"), *place.glob("lib/python*/site-packages/llama_cpp*")]
    return sorted(path.name for path in found)


WHOLE = ["llama.cpp", "llama_cpp", f"llama_cpp_python-{VERSION}.dist-info"]


def test_a_set_up_puts_libraries_and_converter_where_the_exporter_finds_them(ready: Machine) -> None:
    """Nothing else of the sdist, and what it was made from beside it."""
    place = ready.root / "env"
    home = place / "share/gemma-export/llama.cpp"
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert files == {*CONVERTER, "origin.json"}
    origin = json.loads((home / "origin.json").read_text())
    assert origin == {"llama_cpp_python": VERSION, "sha256": ready.release.sha256, "cmake_args": OURS}
    python = [str(place / "bin" / "python"), "-c", FIND]
    found = subprocess.run(python, env=ready.environment, capture_output=True, text=True, check=True).stdout.split()
    (library,) = place.glob("lib/python*/site-packages/llama_cpp/lib/libggml-base.so")
    assert found == [str(home), str(library)]


def test_a_second_set_up_has_nothing_to_do(ready: Machine, tmp_path: Path) -> None:
    """It has no index, no compiler and no cache, so it would fail if it did anything."""
    did = ready.run(ready.root / "env", PATH="", PIP_FIND_LINKS="", XDG_CACHE_HOME=str(tmp_path))
    assert did == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_another_environment_takes_what_was_built(ready: Machine) -> None:
    """With the sdist out of reach, there is only the cache."""
    place = ready.make("another")
    assert ready.run(place, PIP_FIND_LINKS="")[0] == 0
    assert installed(place) == WHOLE


def test_a_converter_that_is_not_whole_is_put_right(ready: Machine) -> None:
    """As it is after a set-up that died in its midst: whatever lies there, without its origin."""
    home = ready.root / "env/share/gemma-export/llama.cpp"
    (home / "origin.json").unlink()
    shutil.rmtree(home / "conversion")
    (home.parent / "llama.cpp.part" / "conversion").mkdir(parents=True)
    assert ready.run(ready.root / "env", PIP_FIND_LINKS="")[0] == 0
    assert (home / "conversion").is_dir()
    assert (home / "origin.json").is_file()
    assert installed(ready.root / "env") == WHOLE


def test_cmake_args_of_the_environment_come_last_and_make_another_build(ready: Machine) -> None:
    """The last -D of a name wins in CMake; without them, the first build is taken again."""
    place = ready.make("with-arguments")
    origin = place / "share/gemma-export/llama.cpp/origin.json"
    theirs = '-DGGML_NATIVE=ON -DNAME="a b"'
    for environments, args in ((theirs, f"{OURS} {theirs}"), ("", OURS)):
        assert ready.run(place, CMAKE_ARGS=environments)[0] == 0
        assert json.loads(origin.read_text())["cmake_args"] == args
    # The first argument names a file of the set-up's own.
    assert [line.partition(" ")[2] for line in ready.builds()] == [OURS, f"{OURS} {theirs}"]


def test_an_sdist_of_another_hash_is_refused_and_nothing_is_left(machine: Machine) -> None:
    """Nothing of it is run, either."""
    place = machine.make("env")
    code, _, errors = machine.run(place, release=Release(VERSION, "0" * 64))
    assert code == 1
    assert "DO NOT MATCH THE HASHES" in errors
    assert machine.release.sha256 in errors
    assert (machine.builds(), machine.cached(), installed(place)) == ([], ["build.log"], [])


def test_a_release_that_cannot_be_downloaded_says_so(machine: Machine) -> None:
    machine.sdist.unlink()
    code, _, errors = machine.run(machine.make("env"))
    assert code == 1
    assert errors.startswith(f"setup: pip could not download llama-cpp-python {VERSION} with sha256")
    assert "No matching distribution" in errors


def test_a_build_that_fails_shows_the_end_of_its_log(machine: Machine) -> None:
    """What the compiler said, and where all of it stands; nothing is installed."""
    place = machine.make("env")
    code, _, errors = machine.run(place, BUILD_DOES="fail")
    assert code == 1
    assert "llama.cpp could not be built" in errors
    assert "ggml.c:1: error: no such instruction" in errors
    assert str(machine.cache / "build.log") in errors
    assert (machine.cached(), installed(place)) == (["build.log"], [])


def test_a_missing_compiler_is_named_before_anything_is_downloaded(machine: Machine) -> None:
    code, said, errors = machine.run(machine.make("env"), PATH="")
    assert (code, said) == (1, "")
    assert "llama.cpp needs a C compiler" in errors
    assert "build-essential" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_half(number: signal.Signals, machine: Machine) -> None:
    """Nothing that the next set-up would take for a build, and none of it stays."""
    place = machine.make("env")
    pid = machine.root / "builds.pid"
    with machine.start(place, BUILD_DOES="wait") as process:
        until(lambda: pid.exists() and pid.read_text() != "", "the build")
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        # It was asked to end, as ninja has to be, or its compilers go on.
        assert (machine.root / "builds.ended").exists()
        assert not Path("/proc", pid.read_text()).exists()
        assert machine.cached() == ["build.log"]
    else:  # nobody was left to end it
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert installed(place) == []
    assert machine.run(place)[0] == 0
    (built,) = machine.cached()
    assert sorted(path.name for path in (machine.cache / built).iterdir()) == [
        "llama.cpp",
        f"llama_cpp_python-{VERSION}-py3-none-any.whl",
    ]


def test_of_two_set_ups_at_once_one_builds(machine: Machine) -> None:
    """Two environments with one cache: the second waits, and both are whole afterwards."""
    one, two = machine.make("one"), machine.make("two")
    with machine.start(one, BUILD_DOES="wait") as first:
        try:
            until(lambda: (machine.root / "builds.pid").exists(), "the build")
            with machine.start(two) as second:
                assert second.stdout is not None
                assert second.stdout.readline() == "setup: waiting for another set-up of llama.cpp\n"
                (machine.root / "builds.go").touch()
                second.communicate(timeout=120)
        finally:  # or the build would wait for ever
            (machine.root / "builds.go").touch()
        first.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(machine.builds()) == 1
    assert (installed(one), installed(two)) == (WHOLE, WHOLE)


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A member of an sdist that has no bytes of its own."""
    member = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/vendor/llama.cpp/{name}")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        link("conversion/secret.py"),
        link("conversion/secret.py", tarfile.LNKTYPE),
        link("conversion/secret.py", tarfile.FIFOTYPE),
        link("conversion/../../../escaped.py", tarfile.REGTYPE),
    ],
    ids=["symlink", "hard link", "fifo", "outside"],
)
def test_a_converter_with_anything_but_plain_files_is_refused(member: tarfile.TarInfo, tmp_path: Path) -> None:
    sdist = write_sdist(tmp_path / "index", VERSION, member)
    with pytest.raises(SetUpError, match=r"no plain file under vendor/llama\.cpp"):
        copy_converter(sdist, tmp_path / "a" / "b" / "converter")
    assert not list(tmp_path.rglob("escaped.py"))


def test_an_sdist_without_a_converter_is_refused(tmp_path: Path) -> None:
    sdist = tmp_path / "empty.tar.gz"
    tarfile.open(sdist, "w:gz").close()
    with pytest.raises(SetUpError, match=r"empty\.tar\.gz has no vendor/llama\.cpp/LICENSE"):
        copy_converter(sdist, tmp_path / "converter")


def test_pip_is_told_the_pinned_release() -> None:
    """pyproject.toml repeats the version, for pip to find what the set-up installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line for line in project["optional-dependencies"]["gguf"] if line.startswith("llama-cpp-python")]
    assert named == [f"llama-cpp-python=={PINNED.version}"]


def test_the_set_up_needs_nothing_but_the_standard_library() -> None:
    """It runs before anything is installed: here, without site-packages."""
    program = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(ROOT)!r}); import infra.llama_cpp"]
    subprocess.run(program, check=True)
