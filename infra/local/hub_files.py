"""A file as the hub on this machine tells of it and sends it: its ids, and its bytes without being held in memory."""

import functools
import hashlib
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", "tokenizer.json")
"""What repositories of models keep in Git LFS, by their `.gitattributes` or for its size."""
_BLOCK_BYTES = 4 << 20
_SLICES_PER_SECOND = 50


@dataclass(frozen=True)
class StoredFile:
    """A file in a repository.

    Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md for the pointer that Git itself holds.
    """

    path: Path
    size: int
    sha256: str
    git_id: str
    """sha1 of the blob in Git: of the content, or of the pointer to it."""

    @property
    def is_large(self) -> bool:
        """Whether it is kept in LFS, and sent by another host."""
        return self.path.name.endswith(LARGE_SUFFIXES)

    @property
    def etag(self) -> str:
        """What the hub tells as the file's ETag, without quotes."""
        return self.sha256 if self.is_large else self.git_id

    def as_sibling(self) -> dict[str, Any]:
        """As `siblings` of a model have it when asked with `blobs`."""
        told: dict[str, Any] = {"rfilename": self.path.name, "size": self.size, "blobId": self.git_id}
        return told | ({"lfs": self._lfs()} if self.is_large else {})

    def in_tree(self) -> dict[str, Any]:
        """As the listing of a folder has it."""
        told: dict[str, Any] = {"type": "file", "path": self.path.name, "size": self.size, "oid": self.git_id}
        return told | ({"lfs": {**self._lfs(), "oid": self.sha256}} if self.is_large else {})

    def _lfs(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.size, "pointerSize": len(_pointer(self.sha256, self.size))}


def stored(path: Path) -> StoredFile:
    """A file as it is now; its digests are made once for each size and time of change."""
    facts = path.stat()
    return _digested(path, facts.st_size, facts.st_mtime_ns)


def range_of(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last that a Range header asks for, of a file of `size` bytes."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if not wanted or int(wanted[1]) >= size:
        return None
    return int(wanted[1]), min(int(wanted[2]) + 1, size) if wanted[2] else size


def send(connection: socket.socket, path: Path, start: int, stop: int, bytes_per_second: int | None) -> None:
    """Send the bytes from `start` up to `stop` of a file, in the kernel; no faster than told."""
    block = _BLOCK_BYTES if bytes_per_second is None else max(1, bytes_per_second // _SLICES_PER_SECOND)
    began, sent = time.monotonic(), 0
    with path.open("rb") as file:
        while start + sent < stop:
            count = connection.sendfile(file, start + sent, min(block, stop - start - sent))
            if count == 0:
                return  # the file was cut short meanwhile
            sent += count
            if bytes_per_second is not None:
                time.sleep(max(0.0, began + sent / bytes_per_second - time.monotonic()))


@functools.cache
def _digested(path: Path, size: int, changed_ns: int) -> StoredFile:
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    large = path.name.endswith(LARGE_SUFFIXES)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := file.read(_BLOCK_BYTES):
            (sha256 if large else sha1).update(block)
    if large:
        pointer = _pointer(sha256.hexdigest(), size)
        sha1 = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer, usedforsecurity=False)
    return StoredFile(path, size, sha256.hexdigest() if large else "", sha1.hexdigest())


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
