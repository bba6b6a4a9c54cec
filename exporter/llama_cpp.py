"""Where llama.cpp lies: its converter and its libraries, which are of one release or are refused.

`python -m infra.llama_cpp` puts both there, from one sdist. Nothing here imports the package `llama_cpp`, which loads
all of its libraries.
"""

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from dispatcher.errors import NotAvailable

DISTRIBUTION = "llama-cpp-python"
PLACE = Path("share", "gemma-export", "llama.cpp")
"""Where the converter lies, under `sys.prefix`"""
ORIGIN = "origin.json"
"""What the converter was taken from; written last, so that what has none is not whole"""
MODULES = ("conversion", "gguf")
SUFFIXES = {"darwin": (".dylib", ".so"), "win32": (".dll",)}
SET_UP = "Run `make setup`, or `python -m infra.llama_cpp` with this Python."


def home() -> Path:
    """The directory of `convert_hf_to_gguf.py`, `conversion/` and `gguf-py/`, of the release that is installed.

    Raises:
        NotAvailable: It is not there (`llama_cpp_missing`), or of another release than the installed libraries
            (`llama_cpp_mismatch`).
    """
    directory = Path(sys.prefix) / PLACE
    installed = installed_version()
    if installed is None:
        raise NotAvailable(f"{DISTRIBUTION} is not installed under {sys.prefix}. {SET_UP}", code="llama_cpp_missing")
    origin = read_origin(directory)
    if origin is None:
        raise NotAvailable(f"llama.cpp's converter is not in {directory}. {SET_UP}", code="llama_cpp_missing")
    found = origin.get("llama_cpp_python")
    if found != installed:
        raise NotAvailable(
            f"llama.cpp's converter in {directory} is that of {DISTRIBUTION} {found}, its libraries are those of "
            f"{installed}; they have to be of one release. {SET_UP}",
            code="llama_cpp_mismatch",
        )
    return directory


def ensure_importable() -> None:
    """Make `import conversion` and `import gguf` llama.cpp's own, whatever else of these names is installed.

    Raises:
        NotAvailable: As `home` does; or this process has imported another `conversion` or `gguf` already
            (`llama_cpp_mismatch`).
    """
    directory = home()
    for name in MODULES:
        module = sys.modules.get(name)
        if module is not None and not any(path.is_relative_to(directory.resolve()) for path in _places(module)):
            raise NotAvailable(
                f"this process has imported {name!r} from {', '.join(map(str, _places(module))) or 'nowhere'}, where "
                f"{directory} was expected. Uninstall that package, or do not import it beside the exporter.",
                code="llama_cpp_mismatch",
            )
    ours = [str(directory), str(directory / "gguf-py")]
    sys.path[:] = [*ours, *(path for path in sys.path if path not in ours)]


def library(name: str) -> Path:
    """One of llama.cpp's shared libraries, for ctypes.

    Args:
        name: As its file is named, without the suffix: `libggml-base`, `libllama`.

    Raises:
        NotAvailable: As `home` does; or the installed package has no such library (`libggml_missing`).
    """
    home()
    # Finds a top-level package without importing it.
    spec = importlib.util.find_spec("llama_cpp")
    directories = [Path(place) / "lib" for place in (spec and spec.submodule_search_locations) or ()]
    suffixes = SUFFIXES.get(sys.platform, (".so",))
    for path in (directory / f"{name}{suffix}" for directory in directories for suffix in suffixes):
        if path.is_file():
            return path
    raise NotAvailable(
        f"{DISTRIBUTION} has no {name}{suffixes[0]} in {', '.join(map(str, directories)) or 'any directory'}. "
        f"Uninstall it, then: {SET_UP}",
        code="libggml_missing",
    )


def installed_version() -> str | None:
    """The installed release of llama-cpp-python."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def read_origin(directory: Path) -> dict[str, str] | None:
    """What the converter in a directory was taken from, as `infra.llama_cpp` noted it; of half a one, nothing."""
    try:
        origin = json.loads((directory / ORIGIN).read_text())
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) else None


def _places(module: ModuleType) -> list[Path]:
    """Where a module was imported from."""
    found = [module.__file__] if getattr(module, "__file__", None) else list(getattr(module, "__path__", ()))
    return [Path(place).resolve() for place in found if place]
