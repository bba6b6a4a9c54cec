"""An artifact store that fails at random around a real one, its writers and readers too."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Self, TypeVar

from dispatcher.artifacts import (
    SMALL_FILE_LIMIT,
    ArtifactReader,
    ArtifactStore,
    ArtifactWriter,
    StoredFile,
)
from dispatcher.errors import ExportError, Unavailable
from tests.chaos.faults import Dice, Fate

T = TypeVar("T")
MANY = 8
"""By how much a block fails less often than a call: a file has many."""


class FaultyArtifacts:
    """An artifact store that fails at random.

    Args:
        inner: The real one.
        dice: Decides when.
        caller: Whose it is.
        writes: Told of each path that is about to be written.
    """

    def __init__(
        self, inner: ArtifactStore, dice: Dice, caller: str, writes: Callable[[str], object] = lambda path: None
    ) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller
        self._writes = writes

    def uri(self, path: str) -> str:
        return self._inner.uri(path)

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        self._writes(path)

        def act() -> ArtifactWriter:
            return self._inner.create(path, size=size)

        # Once: a file that is begun twice is one that nobody sees, and no store shows it either.
        writer = self._dice.call(self._caller, "create", act, once=True)
        return _FaultyWriter(writer, self._dice, self._caller, act, lambda: self._writes(path))

    def compose(self, path: str, parts: Sequence[str], *, scratch: str | None = None) -> StoredFile:
        self._writes(path)
        return self._call("compose", lambda: self._inner.compose(path, parts, scratch=scratch))

    def children(self, path: str) -> list[str]:
        return self._call("children", lambda: self._inner.children(path))

    def list(self, uri: str, *, checksums: bool = True) -> list[StoredFile]:
        return self._call("list", lambda: self._inner.list(uri, checksums=checksums))

    def read(self, uri: str, *, limit: int = SMALL_FILE_LIMIT) -> bytes:
        return self._call("read", lambda: self._inner.read(uri, limit=limit))

    def open(self, uri: str) -> ArtifactReader:
        reader = self._dice.call(self._caller, "open", lambda: self._inner.open(uri), once=True)
        return _FaultyReader(reader, self._dice, self._caller)

    def exists(self, uri: str) -> bool:
        return self._call("exists", lambda: self._inner.exists(uri))

    def delete_prefix(self, path: str) -> int:
        return self._call("delete_prefix", lambda: self._inner.delete_prefix(path))

    def remove_unpublished(self, path: str) -> int:
        return self._call("remove_unpublished", lambda: self._inner.remove_unpublished(path))

    def fingerprint(self, uri: str) -> str:
        return self._call("fingerprint", lambda: self._inner.fingerprint(uri))

    def download_url(self, uri: str, expires: timedelta) -> str | None:
        return self._call("download_url", lambda: self._inner.download_url(uri, expires))

    def _call(self, name: str, act: Callable[[], T]) -> T:
        return self._dice.call(self._caller, name, act)


class _FaultyWriter:
    """A writer that fails at random."""

    def __init__(
        self,
        inner: ArtifactWriter,
        dice: Dice,
        caller: str,
        again: Callable[[], ArtifactWriter],
        writes: Callable[[], object],
    ) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller
        self._again = again
        self._writes = writes
        self._written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        def act() -> None:
            self._inner.write(data)
            self._written += data

        self._dice.call(self._caller, "write", act, rarer=MANY, once=True)

    def commit(self) -> StoredFile:
        self._writes()
        fate = self._dice.fate(self._caller, "commit")
        if fate is Fate.NOT_DONE:
            raise Unavailable(f"commit of {self._caller} did not get through, as the dice has it")
        try:
            stored = self._inner.commit()
            if fate is Fate.TWICE:
                stored = self._committed_again()
        except ExportError:
            if fate is not Fate.ANSWER_LOST:
                raise
        if fate is Fate.ANSWER_LOST:
            raise Unavailable(f"the answer of commit to {self._caller} was lost, as the dice has it")
        return stored

    def discard(self) -> None:
        self._inner.discard()

    def _committed_again(self) -> StoredFile:
        """What a transport that sends it again finds: the same content, there already."""
        writer = self._again()
        try:
            writer.write(self._written)
            return writer.commit()
        finally:
            writer.discard()


class _FaultyReader:
    """A reader that fails at random."""

    def __init__(self, inner: ArtifactReader, dice: Dice, caller: str) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller

    @property
    def size(self) -> int:
        return self._inner.size

    def read(self, offset: int, length: int) -> bytes:
        return self._dice.call(self._caller, "read_part", lambda: self._inner.read(offset, length), rarer=MANY)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, *exit: object) -> None:
        self._inner.__exit__(*exit)
