"""Doctor's questions to this machine, where nothing is in the cloud: its state directory, and what makes exports."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from dispatcher.artifacts import open_artifacts, path_of, publish
from dispatcher.doctor_findings import CONTENT, FINE, Check, Group, Outcome, Verdict
from dispatcher.errors import Unavailable
from dispatcher.records import open_records
from dispatcher.runner import EXPORTER
from dispatcher.settings import Settings

CHILD_SECONDS = 30
LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")
"""What the exporter stands on; to look whether they are there does not load them."""
_LLAMA_CPP = """
from dispatcher.errors import ExportError
from exporter.llama_cpp import home
try:
    home()
except ExportError as error:
    raise SystemExit(error.message)
"""
_INSTALL = "install gemma-export[exporter] into this Python, as `make setup` does"


def laptop_group(settings: Settings) -> Group:
    """The checks of embedded parts."""
    artifacts = path_of(settings.artifacts_url)
    database = Path(unquote(urlsplit(settings.records_url).path))
    return Group(
        [
            Check("laptop.artifacts", f"publish a file where {artifacts} is", _writable(lambda: _publish(artifacts))),
            Check("laptop.records", f"open the records in {database}", _writable(lambda: _open(database))),
            Check("laptop.exporter", "run the exporter", _exporter),
            Check("laptop.llama_cpp", "find llama.cpp, which GGUF needs", _llama_cpp, requires=("laptop.exporter",)),
        ]
    )


def _writable(probe: Callable[[], object]) -> Callable[[], Verdict]:
    def asked() -> Verdict:
        try:
            probe()
        except (OSError, Unavailable) as error:
            remedy = "set GEMMA_EXPORT_HOME to a directory that can be written to"
            return Verdict(Outcome.MISSING, "state_not_writable", str(error), remedy)
        return FINE

    return asked


def _publish(directory: Path) -> None:
    with _beside(directory) as place:
        store = open_artifacts(place.as_uri())
        publish(store, "probe", lambda writer: writer.write(CONTENT))
        store.read(store.uri("probe"))


def _open(database: Path) -> None:
    """The records themselves, or where there are none yet, some at the same place."""
    with _beside(database.parent) as place:
        there = database if database.exists() else place / database.name
        with closing(open_records(f"sqlite://{quote(str(there))}")) as store:
            store.list_exports(limit=1)


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """A temporary directory in another one, or where that would be made."""
    there = next(place for place in (directory, *directory.parents) if place.exists())
    with tempfile.TemporaryDirectory(prefix=".gemma-export-doctor-", dir=there) as place:
        yield Path(place)


def _exporter() -> Verdict:
    lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if lacking:
        return Verdict(Outcome.MISSING, "exporter_missing", f"not installed: {', '.join(lacking)}", _INSTALL)
    said = _failure([*EXPORTER, "--help"])
    return FINE if said is None else Verdict(Outcome.MISSING, "exporter_missing", said, _INSTALL)


def _llama_cpp() -> Verdict:
    # In a process of its own, since nothing of the exporter is ever loaded into this one.
    said = _failure([sys.executable, "-P", "-c", _LLAMA_CPP])
    if said is None:
        return FINE
    return Verdict(Outcome.MISSING, "llama_cpp_missing", said, "run `make setup`; only GGUF exports need it")


def _failure(command: Sequence[str]) -> str | None:
    """What a command says when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=CHILD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().rpartition("\n")[2]
    return None if done.returncode == 0 else said or f"it ended with code {done.returncode}"
