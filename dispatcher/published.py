"""Where versions lie, and whether what was published is still there, told by what a listing says: no weights are read.

`{root}/{job_id}/{version}/` is a version, which is published once `MANIFEST_NAME` is in it; beside it lies
`{version}.parts/`, what attempts at it share.
"""

from collections.abc import Iterable

import pydantic

from dispatcher.artifacts import ArtifactStore, StoredFile
from dispatcher.contract import ExportType
from dispatcher.errors import SourceError

ROOTS = {ExportType.MERGED: "merged_models", ExportType.GGUF: "gguf_models"}
BASES_ROOT = "base_models"
"""Where the exporter keeps what it read from the hub, `{repo}@{commit}/`."""
MANIFEST_NAME = "export.json"
PARTS_SUFFIX = ".parts"
SPOILT_PREFIX = "spoilt."
"""In `{version}.parts/`, of a mark: whoever put it there may be removing the version, which is not made meanwhile."""
COLLECTED_PREFIX = f"{SPOILT_PREFIX}collected."
"""Of a collector's mark: a published version that bears it is not found finished either."""


class _File(pydantic.BaseModel):
    name: str
    bytes: int
    crc32c: str = ""


class _Manifest(pydantic.BaseModel):
    """What we read of `export.json`; the rest of it is for people and for the exporter."""

    files: list[_File]


def spoilt_marks(artifacts: ArtifactStore, version: str) -> list[str]:
    """The names of the marks beside the version at a path; with one it is not made, since it would be removed."""
    names = artifacts.children(f"{version}{PARTS_SUFFIX}")
    return [name for name in names if name.startswith(SPOILT_PREFIX)]


def is_being_collected(marks: Iterable[str]) -> bool:
    """Whether one of these marks says that even a published version is about to be removed."""
    return any(mark.startswith(COLLECTED_PREFIX) for mark in marks)


def listed_files(artifacts: ArtifactStore, manifest: str) -> list[StoredFile]:
    """What the manifest at a URI lists, and the manifest itself, whose checksum it cannot tell.

    Raises:
        NotFound: There is no manifest.
        SourceError: It is none (`manifest_unreadable`).
    """
    content = artifacts.read(manifest)
    try:
        files = _Manifest.model_validate_json(content).files
    except pydantic.ValidationError as error:
        raise SourceError(f"{manifest} is no manifest: its files are not told", code="manifest_unreadable") from error
    itself = StoredFile(manifest.rpartition("/")[2], len(content), "")
    return [*(StoredFile(file.name, file.bytes, file.crc32c) for file in files), itself]


def is_whole(artifacts: ArtifactStore, manifest: str) -> bool:
    """Whether every file that the manifest at a URI lists lies beside it; see `are_there`.

    Raises:
        NotFound: There is no manifest: nothing was published there, or all of it was collected.
    """
    try:
        # The listed names are only compared, never opened: one that leads elsewhere is simply not there.
        return are_there(artifacts, manifest.rpartition("/")[0], listed_files(artifacts, manifest))
    except SourceError:
        return False


def are_there(artifacts: ArtifactStore, directory: str, files: Iterable[StoredFile]) -> bool:
    """Whether every one of these files lies under a directory's URI with its size in bytes.

    And with its crc32c, where the store tells that without reading, as Cloud Storage does.
    """
    there = {file.name: file for file in artifacts.list(directory, checksums=False)}
    return all(file.name in there and _is_same(there[file.name], file) for file in files)


def _is_same(found: StoredFile, wanted: StoredFile) -> bool:
    told = found.crc32c and wanted.crc32c
    return found.size == wanted.size and (not told or found.crc32c == wanted.crc32c)
