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


def is_whole(artifacts: ArtifactStore, manifest: str) -> bool:
    """Whether every file that the manifest at a URI lists lies beside it with its size.

    Raises:
        NotFound: There is no manifest: nothing was published there, or all of it was collected.
    """
    try:
        # The listed names are only compared, never opened: one that leads elsewhere is simply not there.
        wanted = _Manifest.model_validate_json(artifacts.read(manifest)).files
        return are_there(artifacts, manifest.rpartition("/")[0], {file.name: file.bytes for file in wanted})
    except (pydantic.ValidationError, SourceError):
        return False


def are_there(artifacts: ArtifactStore, directory: str, sizes: Mapping[str, int]) -> bool:
    """Whether every one of these files lies under a directory's URI with its size in bytes."""
    there = {file.name: file.size for file in artifacts.list(directory, checksums=False)}
    return all(there.get(name) == size for name, size in sizes.items())
