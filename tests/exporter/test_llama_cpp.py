"""Where llama.cpp is looked for, and when it is refused."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dispatcher.errors import NotAvailable
from exporter import llama_cpp
from infra.llama_cpp import PINNED

# What runs here sees llama.cpp as the exporter does: nothing of it imported yet.
OWN = """
from exporter.llama_cpp import ensure_importable, home
import sys
ensure_importable()
path = list(sys.path)
ensure_importable()
assert sys.path == path
import conversion, gguf
assert "llama_cpp" not in sys.modules
print(conversion.__file__, gguf.__file__)
"""
FOREIGN = """
import {name}
from dispatcher.errors import NotAvailable
from exporter.llama_cpp import ensure_importable
try:
    ensure_importable()
except NotAvailable as error:
    print(error.error_code, error.message)
"""
QUANTIZE = """
import ctypes, struct
from exporter.llama_cpp import library
ggml = ctypes.CDLL(str(library("libggml-base")))
ctypes.CDLL(str(library("libllama")))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
]
weights, block = (ctypes.c_float * 32)(*range(-15, 17)), ctypes.create_string_buffer(34)
assert ggml.ggml_quantize_chunk(8, weights, block, 0, 1, 32, None) == 34
print(*struct.unpack("<e32b", block.raw))
"""


def run(program: str, *, path: Path | None = None) -> str:
    """What a program prints, in a fresh interpreter; `path` goes before all else on sys.path."""
    before = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run([sys.executable, "-c", before + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def prefix(root: Path, monkeypatch: pytest.MonkeyPatch, *, installed: str | None, converter: object) -> Path:
    """Python under another prefix, with a release or none, and what is noted of the converter; where that lies."""
    known = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)  # it is found there first
    monkeypatch.setattr(sys, "path", [str(root / "site"), *(path for path in sys.path if path not in known)])
    monkeypatch.setattr(sys, "prefix", str(root))
    package = root / "site" / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    if installed:
        (package / "__init__.py").write_text("raise ImportError('loads everything')")
        info = root / "site" / f"llama_cpp_python-{installed}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {installed}\n")
    directory = root / "share" / "gemma-export" / "llama.cpp"
    directory.mkdir(parents=True)
    if converter is not None:
        text = converter if isinstance(converter, str) else json.dumps(converter)
        (directory / "origin.json").write_text(text)
    return directory


def test_what_make_setup_installed_is_the_pinned_release() -> None:
    """Libraries, converter and hash are of one release."""
    home = llama_cpp.home()
    assert (home / "convert_hf_to_gguf.py").is_file()
    origin = llama_cpp.read_origin(home)
    assert origin is not None
    assert (origin["llama_cpp_python"], origin["sha256"]) == (PINNED.version, PINNED.sha256)
    assert llama_cpp.installed_version() == PINNED.version


def test_the_converter_that_is_imported_is_llama_cpps_own(tmp_path: Path) -> None:
    """Before another gguf that is installed, and without loading the libraries."""
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "__init__.py").write_text("")
    home = llama_cpp.home()
    found = run(OWN, path=tmp_path).split()
    assert found == [str(home / "conversion" / "__init__.py"), str(home / "gguf-py" / "gguf" / "__init__.py")]


@pytest.mark.parametrize("name", ["gguf", "conversion"])
@pytest.mark.parametrize("file", ["__init__.py", "constants.py"], ids=["package", "namespace"])
def test_a_converter_from_elsewhere_that_is_imported_already_is_refused(name: str, file: str, tmp_path: Path) -> None:
    """It would write what the libraries of this release may not read."""
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text("")
    code, _, message = run(FOREIGN.format(name=name), path=tmp_path).partition(" ")
    assert code == "llama_cpp_mismatch"
    assert str(tmp_path / name) in message


def test_the_libraries_quantize() -> None:
    """q8_0 of -15 … 16: the scale is the largest over 127, a byte is the nearest multiple of it."""
    scale, *values = (float(value) for value in run(QUANTIZE).split())
    assert scale == pytest.approx(16 / 127, rel=1e-3)
    assert values == [round(value * 127 / 16) for value in range(-15, 17)]


def test_without_the_package_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix(tmp_path, monkeypatch, installed=None, converter={"llama_cpp_python": "1.0"})
    with pytest.raises(NotAvailable, match="Run `make setup`, or `python -m infra") as refused:
        llama_cpp.home()
    assert refused.value.error_code == "llama_cpp_missing"
    assert str(tmp_path) in refused.value.message


@pytest.mark.parametrize("converter", [None, "", '{"llama_cpp_python": "1.', "[]"], ids=repr)
def test_without_a_whole_converter_it_is_missing(
    converter: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no origin is half a converter."""
    directory = prefix(tmp_path, monkeypatch, installed="1.0", converter=converter)
    for ask in (llama_cpp.home, llama_cpp.ensure_importable, lambda: llama_cpp.library("libllama")):
        with pytest.raises(NotAvailable, match="Run `make setup`") as refused:
            ask()
        assert refused.value.error_code == "llama_cpp_missing"
        assert str(directory) in refused.value.message


@pytest.mark.parametrize("converter", [{"llama_cpp_python": "0.9"}, {}], ids=repr)
def test_a_converter_of_another_release_is_refused(
    converter: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both releases are named."""
    prefix(tmp_path, monkeypatch, installed="1.0", converter=converter)
    for ask in (llama_cpp.home, llama_cpp.ensure_importable, lambda: llama_cpp.library("libllama")):
        with pytest.raises(NotAvailable, match=r"those of 1\.0") as refused:
            ask()
        assert refused.value.error_code == "llama_cpp_mismatch"
        assert f"llama-cpp-python {converter.get('llama_cpp_python')}" in refused.value.message


def test_a_package_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the file, and only the one that is asked for; the package is not imported for it."""
    directory = prefix(tmp_path, monkeypatch, installed="1.0", converter={"llama_cpp_python": "1.0"})
    assert llama_cpp.home() == directory
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    there = tmp_path / "site" / "llama_cpp" / "lib" / f"libllama{suffix}"
    there.touch()
    assert llama_cpp.library("libllama") == there
    with pytest.raises(NotAvailable, match="libggml-base") as refused:
        llama_cpp.library("libggml-base")
    assert refused.value.error_code == "libggml_missing"
    assert str(there.parent) in refused.value.message
