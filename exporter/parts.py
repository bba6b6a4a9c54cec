"""The parts that an artifact's weights are written in: whichever attempt or task finishes one, no other makes it again.

Beside the version's directory lies one small create-only marker for each finished part: its size, its crc32c, and how
far its tensors went from the base's.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

import pydantic

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import ArtifactConflict, NotFound
from exporter.attempt import Attempt
from exporter.lora import Delta

log = logging.getLogger(__name__)
_MARKER = ".json"

Fill = Callable[[ArtifactWriter], Mapping[str, Delta]]
"""Writes a part; returns how far each changed tensor went from the base's."""


class _Marker(pydantic.BaseModel):
    bytes: int
    crc32c: str
    deltas: dict[str, tuple[float, float, float, bool]]


@dataclass(frozen=True)
class Part:
    """A finished part."""

    file: StoredFile
    deltas: Mapping[str, Delta]
    """Of every changed tensor, how far it went from the base's in this part"""


class Parts:
    """The parts of one version.

    Args:
        attempt: Who makes them.
        folder: Where they lie themselves.
    """

    def __init__(self, attempt: Attempt, folder: str) -> None:
        self._attempt = attempt
        self._folder = folder

    def finished(self, sizes: Mapping[str, int]) -> dict[str, Part]:
        """Those that are finished, by name, whoever made them; a marker without its part counts for nothing.

        Args:
            sizes: Every part by name, and its size in bytes.
        """
        store = self._attempt.store
        markers = {file.name for file in store.list(store.uri(self._attempt.parts_directory), checksums=False)}
        if not markers:
            return {}
        there = {file.name: file for file in store.list(store.uri(self._folder), checksums=False)}
        found = {}
        for name, size in sizes.items():
            if name not in there or f"{name}{_MARKER}" not in markers:
                continue
            part = self._read(name)
            if part is None or not part.file.size == there[name].size == size:
                continue
            if there[name].crc32c in ("", part.file.crc32c):
                found[name] = part
        return found

    def write(self, name: str, fill: Fill, size: int) -> Part:
        """Publish a part, then its marker.

        Where somebody else has finished the same bytes meanwhile, their marker counts: sums of floats are not the same
        in every order of the blocks.

        Args:
            name: Its name.
            fill: Writes it.
            size: Bytes.

        Raises:
            ExportError: As `Attempt.publish`.
        """
        deltas: dict[str, Delta] = {}

        def filled(writer: ArtifactWriter) -> None:
            deltas.update(fill(writer))

        part = Part(self._attempt.publish(name, filled, size=size, folder=self._folder), deltas)
        content = _encoded(part)
        try:
            self._attempt.publish(
                f"{name}{_MARKER}",
                lambda writer: writer.write(content),
                size=len(content),
                folder=self._attempt.parts_directory,
            )
        except ArtifactConflict:
            theirs = self._read(name)
            if theirs is None or theirs.file != part.file:
                raise
            return theirs
        return part

    def _read(self, name: str) -> Part | None:
        store = self._attempt.store
        try:
            content = store.read(store.uri(f"{self._attempt.parts_directory}/{name}{_MARKER}"))
        except NotFound:
            return None  # the version was published just now, or given up
        return _decoded(name, content)


def _encoded(part: Part) -> bytes:
    deltas = {name: astuple(delta) for name, delta in part.deltas.items()}
    return json.dumps({"bytes": part.file.size, "crc32c": part.file.crc32c, "deltas": deltas}).encode() + b"\n"


def _decoded(name: str, content: bytes) -> Part | None:
    """What a marker says; None where it is none of ours."""
    try:
        facts = _Marker.model_validate_json(content)
    except pydantic.ValidationError:
        log.warning("the marker of %s cannot be read: the part is made again", name)
        return None
    deltas = {tensor: Delta(*delta) for tensor, delta in facts.deltas.items()}
    return Part(StoredFile(name, facts.bytes, facts.crc32c), deltas)
