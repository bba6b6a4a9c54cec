"""Whether what was published is still there, told by names and sizes alone: no weights are read."""

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
        there = {file.name: file.size for file in artifacts.list(manifest.rpartition("/")[0], checksums=False)}
    except (pydantic.ValidationError, SourceError):
        return False
    return all(there.get(file.name) == file.bytes for file in wanted)
