"""Where bytes come from that must not change while they are read: a local file, an object, a file on the hub.

A source names one version of a file and opens it, as often as is wanted; every byte that a reader gives is of that very
version. What could only be a mixture of two is an error.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from dispatcher.errors import SourceError, Unavailable


class ByteStream(Protocol):
    """Bytes in order, fetched ahead of where they are asked for; for one thread."""

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next.

        Raises:
            ExportError: As `ByteReader.read_into`.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ByteReader(Protocol):
    """An open source; for many threads at once."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on.

        Raises:
            Unavailable: It is not the version that was opened any more (`source_changed`), or cannot be read now.
            SourceError: It never will be readable.
        """

    def stream(self, start: int, stop: int) -> ByteStream:
        """The bytes from `start` up to `stop`, in order; leave its `with` statement to give up what is left."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ByteSource(Protocol):
    """One version of a file."""

    @property
    def name(self) -> str:
        """The file's name, without what it lies in; for messages too."""

    @property
    def size(self) -> int:
        """Bytes."""

    def open(self, *, whole: bool = False) -> ByteReader:
        """Open it for reading; leave its `with` statement to close it.

        Args:
            whole: Whether streams will read all of it but the header, front to back: a source that keeps a copy
                somewhere makes it then.

        Raises:
            Unavailable: It is not this version any more (`source_changed`), or cannot be read now.
        """


def changed(name: str) -> Unavailable:
    """What is raised when a source is not what the plan was made from."""
    return Unavailable(f"{name} changed while it was read; nothing was published. Try again.", code="source_changed")


def read_bytes(reader: ByteReader, offset: int, length: int) -> bytes:
    """`length` bytes from byte `offset`; raises as `ByteReader.read_into`."""
    data = bytearray(length)
    reader.read_into(memoryview(data), offset)
    return bytes(data)


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine, as it was when `of` looked at it."""

    path: Path
    size: int
    stamp: tuple[int, ...]
    """Which file this was: device, inode, size, time of change in ns"""

    @classmethod
    def of(cls, path: Path) -> "LocalFile":
        """The file as it is now.

        Raises:
            SourceError: `file_not_regular`: a directory, a pipe, a device.
            OSError: It cannot be read.
        """
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise SourceError(f"{path.name[:200]!r} is no regular file.", code="file_not_regular")
        stamp = _stamp(facts)
        return cls(path, stamp[2], stamp)

    @property
    def name(self) -> str:
        return self.path.name

    def open(self, *, whole: bool = False) -> "_LocalReader":
        try:
            # Without O_NONBLOCK, a pipe that took the file's name would be waited for.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise changed(self.name) from error
        if _stamp(os.fstat(descriptor)) != self.stamp:
            os.close(descriptor)
            raise changed(self.name)
        return _LocalReader(descriptor, self)


class _LocalReader:
    """Reads with pread into memory of the caller's.

    Not through mmap: touched pages of a mapping count as resident, so a whole model would.
    """

    def __init__(self, descriptor: int, file: LocalFile) -> None:
        self._descriptor = descriptor
        self._file = file
        self._name = file.name

    def read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise Unavailable(f"{self._name} cannot be read: {error.strerror}.") from error
            if count == 0:
                raise changed(self._name)
            done += count

    def stream(self, start: int, stop: int) -> ByteStream:
        return InOrder(self, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit: object) -> None:
        stamp = _stamp(os.fstat(self._descriptor))
        os.close(self._descriptor)
        if exit[0] is None and stamp != self._file.stamp:  # edited in place
            raise changed(self._name)


class InOrder:
    """A stream of a reader that is fast at any offset.

    Args:
        reader: What to read.
        start: The first byte's offset.
    """

    def __init__(self, reader: ByteReader, start: int) -> None:
        self._reader = reader
        self._offset = start

    def read_into(self, view: memoryview) -> None:
        self._reader.read_into(view, self._offset)
        self._offset += len(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The reader is closed by whoever opened it."""


def _stamp(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
