"""Reading files of this machine: listed without following a link elsewhere, opened without waiting for anything."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from dispatcher.errors import NotFound, SourceError, Unavailable

PARTIAL = ".partial"
"""What the hidden names of unpublished files end with."""

MAX_FILE_BYTES = 1 << 38
"""Twice the largest Gemma in float32, in one file; what is listed is read for its checksum, and a hole of any size
takes no room on a disk."""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def walk(top: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, path and size of every regular file under `top`, unpublished ones left out."""
    real_top = top.resolve()
    for directory, folders, files in os.walk(top):
        for name in [*folders, *files]:
            path = Path(directory) / name
            if not _is_utf8(name):
                # Neither a record, a manifest nor an answer could hold that name.
                raise SourceError(
                    f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file", code="file_name_invalid"
                )
            if not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))  # which is a link still, where links lead in a circle
            if name in folders or real_top not in target.parents or target.is_symlink():
                raise SourceError(
                    f"{path} is a symbolic link to {target}: copy the files instead (cp -rL)", code="link_refused"
                )
        for name in files:
            path = Path(directory) / name
            if is_partial(name):
                continue
            with suppress(FileNotFoundError):  # a partial of another process, gone meanwhile
                facts = path.stat()
                if stat.S_ISREG(facts.st_mode):
                    if facts.st_size > MAX_FILE_BYTES:
                        raise SourceError(
                            f"{path} has {facts.st_size} bytes, {MAX_FILE_BYTES} are the most: remove it",
                            code="file_too_large",
                        )
                    yield path.relative_to(top).as_posix(), path, facts.st_size


def is_partial(name: str) -> bool:
    """Whether a file of this name is one that was not published."""
    return name.startswith(".") and name.endswith(PARTIAL)


class LocalReader:
    """Reads through one descriptor, which keeps the very file that it was opened on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Without O_NONBLOCK, opening a pipe would wait for its other end.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing() from error
        except OSError as error:
            raise self._unreadable(error) from error
        facts = os.fstat(self._descriptor)
        self.size = facts.st_size
        if not stat.S_ISREG(facts.st_mode):
            os.close(self._descriptor)
            raise self._missing()

    def read(self, offset: int, length: int) -> bytes:
        blocks = []
        try:
            while block := os.pread(self._descriptor, length, offset):
                blocks.append(block)
                offset, length = offset + len(block), length - len(block)
        except OSError as error:
            raise self._unreadable(error) from error
        return b"".join(blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _missing(self) -> NotFound:
        return NotFound(f"there is no file {self._path}", code="file_not_found")

    def _unreadable(self, error: OSError) -> Unavailable:
        return Unavailable(f"{self._path} cannot be read: {error.strerror}")
