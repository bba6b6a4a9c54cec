"""What one attempt publishes of a version, and takes back when it fails."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dispatcher.artifacts import ArtifactStore, ArtifactWriter, StoredFile, publish
from dispatcher.errors import NotFound, Unavailable
from dispatcher.published import PARTS_SUFFIX, is_spoilt, spoil
from exporter.lease import Hold


@dataclass(frozen=True)
class _Published:
    withdraw: Callable[[], object]
    is_part: bool
    """Whether another attempt can go on from it"""


class Attempt:
    """The files of one attempt at a version.

    Others may publish into the same directory: an attempt before us that was killed, one after us that took over, other
    tasks of our execution. They write the same bytes under the same names, so what they left is used; and what is
    removed is only what this very attempt created, or found finished and took over.

    Args:
        store: Where to.
        directory: The version's directory in it.
    """

    def __init__(self, store: ArtifactStore, directory: str) -> None:
        self.store = store
        self.directory = directory
        self.parts_directory = f"{directory}{PARTS_SUFFIX}"
        """Beside it: what other attempts can go on from, until the version is published"""
        self._published: list[_Published] = []

    def publish(
        self,
        name: str,
        fill: Callable[[ArtifactWriter], object],
        *,
        size: int | None = None,
        folder: str | None = None,
        is_part: bool = False,
    ) -> StoredFile:
        """Publish a file under a name relative to the directory; returned with that name.

        Args:
            name: The name.
            fill: Writes it.
            size: Bytes, if known.
            folder: Another directory.
            is_part: Whether another attempt can go on from it.

        Raises:
            ArtifactConflict, StorageFull: As `dispatcher.artifacts.publish`.
        """

        def noted(writer: ArtifactWriter) -> None:
            self._published.append(_Published(writer.withdraw, is_part))
            fill(writer)

        path = f"{folder or self.directory}/{name}"
        return replace(publish(self.store, path, noted, size=size), name=name)

    def compose(self, name: str, parts: Sequence[str]) -> StoredFile:
        """Put parts of `parts_directory` together into a file of the directory; returned with its name there.

        The file counts as taken over, even if another attempt had put it together before.

        Args:
            name: The file's name.
            parts: Theirs, in order.

        Raises:
            ArtifactConflict, StorageFull, Unavailable: As `ArtifactStore.compose`; and where a part is gone, since
                whoever published the version removes them (`artifact_vanished`).
        """
        path = f"{self.directory}/{name}"
        paths = [f"{self.parts_directory}/{part}" for part in parts]
        try:
            composed = self.store.compose(path, paths, scratch=self.parts_directory)
        except NotFound as error:
            raise Unavailable(
                f"a part of {path} was removed while they were put together; nothing was published. Try again.",
                code="artifact_vanished",
            ) from error
        self.take_over(path)
        return replace(composed.stored, name=name)

    @property
    def is_spoilt(self) -> bool:
        """Whether some attempt found that what lies there is not what belongs there."""
        return is_spoilt(self.store, self.directory)

    def spoil(self) -> None:
        """Say to all attempts and tasks that this version cannot be made any more: that they make another.

        Raises:
            ExportError: It cannot be written.
        """
        spoil(self.store, self.directory)

    def take_over(self, path: str) -> None:
        """Go on from a file that another attempt left: it is this one's to remove now."""
        self._published.append(_Published(partial(self.store.delete_prefix, path), is_part=True))

    def withdraw(self, hold: Hold, *, parts: bool = True) -> None:
        """Remove what this attempt created or took over, as long as nobody else can be counting on it.

        That is asked before every file: a caller may cancel and ask again, and another begin, at any moment.

        Args:
            hold: What we work under.
            parts: Also what another attempt can go on from.
        """
        while self._published and hold.is_ours():
            published = self._published.pop()
            if parts or not published.is_part:
                published.withdraw()
