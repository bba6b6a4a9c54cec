"""What one attempt publishes into a version's directory, and takes back when it fails."""

from collections.abc import Callable
from dataclasses import replace

from dispatcher.artifacts import ArtifactStore, ArtifactWriter, StoredFile, publish
from exporter.lease import Hold


class Attempt:
    """The files of one attempt at a version.

    Others may publish into the same directory: an attempt before us that was killed, one after us that took over.
    They write the same bytes under the same names, so what they left is used; and only what this very attempt
    created is ever removed.

    Args:
        store: Where to.
        directory: The version's directory in it.
    """

    def __init__(self, store: ArtifactStore, directory: str) -> None:
        self.store = store
        self.directory = directory
        self._writers: list[ArtifactWriter] = []

    def publish(self, name: str, fill: Callable[[ArtifactWriter], object], *, size: int | None = None) -> StoredFile:
        """Publish a file of `size` bytes, if known, under a name relative to the directory; returned with that name.

        Raises:
            ArtifactConflict, StorageFull: As `dispatcher.artifacts.publish`.
        """

        def noted(writer: ArtifactWriter) -> None:
            self._writers.append(writer)
            fill(writer)

        return replace(publish(self.store, f"{self.directory}/{name}", noted, size=size), name=name)

    def withdraw(self, hold: Hold) -> None:
        """Remove what this attempt created, as long as nobody else can be counting on it.

        That is asked before every file: a caller may cancel and ask again, and another begin, at any moment.
        """
        while self._writers and hold.is_ours():
            self._writers.pop().withdraw()
