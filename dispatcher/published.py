"""Whether what was published is still there, told by names and sizes alone: no weights are read."""

from collections.abc import Mapping

import pydantic

from dispatcher.artifacts import ArtifactStore
from dispatcher.errors import SourceError


class _File(pydantic.BaseModel):
    name: str
    bytes: int


class _Manifest(pydantic.BaseModel):
    """What we read of `export.json`; the rest of it is for people and for the exporter."""

    files: list[_File]


def listed_files(artifacts: ArtifactStore, manifest: str) -> dict[str, int]:
    """The sizes in bytes of what the manifest at a URI lists, by name, and of the manifest itself.

    Raises:
        NotFound: There is no manifest.
        SourceError: It is none (`manifest_unreadable`).
    """
    content = artifacts.read(manifest)
    try:
        files = _Manifest.model_validate_json(content).files
    except pydantic.ValidationError as error:
        raise SourceError(f"{manifest} is no manifest: its files are not told", code="manifest_unreadable") from error
    return {file.name: file.bytes for file in files} | {manifest.rpartition("/")[2]: len(content)}


def is_whole(artifacts: ArtifactStore, manifest: str) -> bool:
    """Whether every file that the manifest at a URI lists lies beside it with its size.

    Raises:
        NotFound: There is no manifest: nothing was published there, or all of it was collected.
    """
    try:
        # The listed names are only compared, never opened: one that leads elsewhere is simply not there.
        return are_there(artifacts, manifest.rpartition("/")[0], listed_files(artifacts, manifest))
    except SourceError:
        return False


def are_there(artifacts: ArtifactStore, directory: str, sizes: Mapping[str, int]) -> bool:
    """Whether every one of these files lies under a directory's URI with its size in bytes."""
    there = {file.name: file.size for file in artifacts.list(directory, checksums=False)}
    return all(there.get(name) == size for name, size in sizes.items())
