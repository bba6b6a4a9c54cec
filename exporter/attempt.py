"""What one attempt publishes of a version, and what is removed when it fails for good."""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from dispatcher.artifacts import ArtifactStore, ArtifactWriter, StoredFile, publish
from dispatcher.errors import LeaseLost, NotFound, StorageFull, Unavailable
from dispatcher.published import COLLECTED_PREFIX, MANIFEST_NAME, PARTS_SUFFIX, SPOILT_PREFIX
from exporter.lease import Hold


class Attempt:
    """The files of one attempt at a version.

    Others may publish into the same directory: an attempt before us that was killed, one after us that took over, other
    tasks of our execution. They write the same bytes under the same names, so what they left is used.

    Args:
        store: Where to.
        directory: The version's directory in it.
    """

    def __init__(self, store: ArtifactStore, directory: str) -> None:
        self.store = store
        self.directory = directory
        self.parts_directory = f"{directory}{PARTS_SUFFIX}"
        """Beside it: what other attempts can go on from, until the version is published"""
        self._name = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._is_withdrawn = False

    def publish(
        self,
        name: str,
        fill: Callable[[ArtifactWriter], object],
        *,
        size: int | None = None,
        folder: str | None = None,
    ) -> StoredFile:
        """Publish a file under a name relative to the directory; returned with that name.

        Args:
            name: The name.
            fill: Writes it.
            size: Bytes, if known.
            folder: Another directory.

        Raises:
            ArtifactConflict, StorageFull: As `dispatcher.artifacts.publish`.
            LeaseLost: All was withdrawn meanwhile.
        """

        def filled(writer: ArtifactWriter) -> None:
            self._refuse_withdrawn()
            fill(writer)
            self._refuse_withdrawn()

        path = f"{folder or self.directory}/{name}"
        return replace(publish(self.store, path, filled, size=size), name=name)

    def compose(self, name: str, parts: Sequence[str]) -> StoredFile:
        """Put parts of `parts_directory` together into a file of the directory; returned with its name there.

        Args:
            name: The file's name.
            parts: Theirs, in order.

        Raises:
            ArtifactConflict, StorageFull, Unavailable: As `ArtifactStore.compose`; and where a part is gone, since
                whoever published the version removes them (`artifact_vanished`).
            LeaseLost: All was withdrawn meanwhile.
        """
        self._refuse_withdrawn()
        path = f"{self.directory}/{name}"
        paths = [f"{self.parts_directory}/{part}" for part in parts]
        try:
            return replace(self.store.compose(path, paths, scratch=self.parts_directory), name=name)
        except NotFound as error:
            raise Unavailable(
                f"a part of {path} was removed while they were put together; nothing was published. Try again.",
                code="artifact_vanished",
            ) from error

    def spoil(self) -> None:
        """Say to all attempts and tasks that this version cannot be made any more: that they make another.

        Raises:
            ExportError: It cannot be written.
        """
        self._mark(SPOILT_PREFIX)

    def withdraw(self, hold: Hold, *, is_published: bool = False) -> None:
        """Remove all that lies there, whoever wrote it, unless somebody else can be counting on it.

        This process may be stopped for an hour between any two steps, while another attempt goes on from what is there.
        So the version is marked first, and then it is asked whether it still is ours: whoever claims the export after
        that finds the mark, and makes another version.

        The work may call this, and whoever ends the process when the work does not.

        Args:
            hold: What we work under.
            is_published: Whether the manifest is there, and not recorded: the export was cancelled between the two.

        Raises:
            ExportError: A file cannot be removed; the mark stays.
        """
        with self._lock:
            self._is_withdrawn = True
            if not hold.is_ours():
                return
            prefix = COLLECTED_PREFIX if is_published else SPOILT_PREFIX
            try:
                self._mark(prefix)
            except StorageFull:  # what was half written may be in its way; and without a mark nothing is removed
                self.store.remove_unpublished(self.directory)
                self._mark(prefix)
            if hold.is_ours():
                # The manifest first: without it, the rest is no artifact.
                self.store.delete_prefix(f"{self.directory}/{MANIFEST_NAME}")
                self.store.delete_prefix(self.directory)
                self.drop_parts()
            self.store.delete_prefix(f"{self.parts_directory}/{prefix}{self._name}")

    def drop_parts(self) -> None:
        """Remove what others could go on from, but no mark: whoever made one removes it.

        Raises:
            ExportError: Something cannot be removed.
        """
        # By name: a mark may be made between the look and the removal.
        for name in self.store.children(self.parts_directory):
            if not name.startswith(SPOILT_PREFIX):
                self.store.delete_prefix(f"{self.parts_directory}/{name}")

    def _mark(self, prefix: str) -> None:
        publish(self.store, f"{self.parts_directory}/{prefix}{self._name}", lambda writer: writer.write(b"spoilt\n"))

    def _refuse_withdrawn(self) -> None:
        if self._is_withdrawn:
            raise LeaseLost(f"what this attempt wrote in {self.directory} was withdrawn: stop before the next write")
