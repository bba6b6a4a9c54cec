"""A small llama-cpp-python: an sdist that pip downloads, checks and builds as it does the real one, in a second."""

import hashlib
import io
import tarfile
from pathlib import Path

from infra.llama_cpp import Release

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

# It notes each build, with its CMAKE_ARGS, in the file that BUILDS names, and then does what BUILD_DOES says.
BACKEND = """
import os, signal, sys, time, zipfile

VERSION = {version!r}
INFO = f"llama_cpp_python-{{VERSION}}.dist-info"
FILES = {{
    f"{{INFO}}/METADATA": f"Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {{VERSION}}\\n",
    f"{{INFO}}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
}}

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    os.mkdir(os.path.join(directory, INFO))
    for name, text in FILES.items():
        with open(os.path.join(directory, name), "w") as file:
            file.write(text)
    return INFO

def build_wheel(directory, config_settings=None, metadata_directory=None):
    with open(os.environ["BUILDS"], "a") as file:
        print(os.environ["CMAKE_ARGS"], file=file)
    does = os.environ.get("BUILD_DOES")
    if does == "fail":
        sys.exit("ggml.c:1: error: no such instruction")
    if does == "wait":
        def end(number, frame):
            open(os.environ["BUILDS"] + ".ended", "w").close()
            sys.exit(1)
        signal.signal(signal.SIGTERM, end)
        with open(os.environ["BUILDS"] + ".pid", "w") as file:
            file.write(str(os.getpid()))
        while not os.path.exists(os.environ["BUILDS"] + ".go"):
            time.sleep(0.05)
    name = f"llama_cpp_python-{{VERSION}}-py3-none-any.whl"
    package = {{"llama_cpp/__init__.py": "raise ImportError('loads everything')", "llama_cpp/lib/libggml-base.so": ""}}
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        for path, text in {{**package, **FILES}}.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{{INFO}}/RECORD", "")
    return name
"""

CONVERTER = {
    "LICENSE": "MIT License",
    "convert_hf_to_gguf.py": "",
    "conversion/__init__.py": "",
    "gguf-py/LICENSE": "MIT License",
    "gguf-py/gguf/__init__.py": "",
}


def write_sdist(directory: Path, version: str, *members: tarfile.TarInfo) -> Path:
    """An sdist with a converter; further members are links and other things that have no bytes."""
    root = f"llama_cpp_python-{version}"
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n",
        "pyproject.toml": PYPROJECT,
        "backend.py": BACKEND.format(version=version),
        "vendor/llama.cpp/src/llama.cpp": "not the converter's",
        **{f"vendor/llama.cpp/{name}": text for name, text in CONVERTER.items()},
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{root}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        for member in members:
            archive.addfile(member)
    return path


def release_of(sdist: Path, version: str) -> Release:
    """An sdist as it is pinned."""
    return Release(version, hashlib.sha256(sdist.read_bytes()).hexdigest())
