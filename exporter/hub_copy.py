"""A file on the hub as it is read: checked against the hub's own digest, and kept in the bucket if that is wanted."""

import contextvars
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dispatcher.artifacts import ArtifactStore, ArtifactWriter, StoredFile, publish
from dispatcher.errors import ArtifactConflict, ExportError, Unavailable

log = logging.getLogger(__name__)
RECORD = ".json"
"""What the name of a copy's record ends with besides"""
BLOCKS_AHEAD = 2
"""Blocks that wait to be hashed and uploaded"""
_SHA256_DIGITS, _SHA1_DIGITS = 64, 40


def record_of(file: StoredFile) -> bytes:
    """What is written beside a copy whose bytes have proved to be the hub's."""
    return json.dumps({"bytes": file.size, "crc32c": file.crc32c}).encode() + b"\n"


class Copy:
    """A file on its way into the bucket, in a thread of its own; that it cannot be kept fails nobody.

    Args:
        store: Whose bucket; None keeps nothing, and only checks.
        path: Where to.
        size: Bytes of the whole file.
        etag: The hub's: the SHA-256 of a large file, Git's SHA-1 of another.
    """

    def __init__(self, store: ArtifactStore | None, path: str, size: int, etag: str) -> None:
        self.size = 0
        """Bytes so far"""
        self._store, self._path, self._whole, self._etag = store, path, size, etag
        self._what = f"{path} ({size} bytes)"
        self._digest = _digest(etag, size)
        self._writer: ArtifactWriter | None = None
        self._under_way: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._context = contextvars.copy_context()
        self._later(self._begin)

    def write(self, view: memoryview) -> None:
        """Append bytes; they are copied, since whoever reads goes on using the buffer."""
        self.size += len(view)
        block = bytes(view)
        self._later(lambda: self._write(block))
        while len(self._under_way) > BLOCKS_AHEAD:
            self._under_way.popleft().result()

    def commit(self) -> None:
        """Publish the copy, and then its record, if it is what the hub says that the file is.

        Raises:
            Unavailable: What came is not the file (`base_damaged`).
        """
        self._later(self._finish)
        while self._under_way:
            self._under_way.popleft().result()

    def close(self) -> None:
        """Give up what was not committed."""
        self._later(self._discard).result()
        self._pool.shutdown()

    def _later(self, step: Callable[[], None]) -> Future[None]:
        done = self._pool.submit(self._context.run, step)
        self._under_way.append(done)
        return done

    def _begin(self) -> None:
        if self._store is not None and self._digest is not None:
            try:
                self._writer = self._store.create(self._path, size=self._whole)
            except ExportError as error:
                self._give_up(error)

    def _write(self, block: bytes) -> None:
        if self._digest is not None:
            self._digest.update(block)
        if self._writer is not None:
            try:
                self._writer.write(block)
            except ExportError as error:
                self._give_up(error)

    def _finish(self) -> None:
        found = self._digest.hexdigest() if self._digest is not None else self._etag
        if self.size != self._whole or found != self._etag:
            raise Unavailable(
                f"{self._what} did not arrive as the hub has it: {self.size} bytes with digest {found}, "
                f"{self._etag} was expected. Nothing was published; try again.",
                code="base_damaged",
            )
        if self._writer is None or self._store is None:
            return
        try:
            record = record_of(self._writer.commit())
            publish(self._store, f"{self._path}{RECORD}", lambda writer: writer.write(record))
        except ArtifactConflict as error:
            # What has the name is not the hub's file: out of the way with it, so that the next copy can be kept.
            self._store.delete_prefix(f"{self._path}{RECORD}")
            self._store.delete_prefix(self._path)
            self._give_up(error)
        except ExportError as error:
            self._give_up(error)
        else:
            log.info("kept %s", self._what)

    def _give_up(self, error: ExportError) -> None:
        log.warning("no copy is kept of %s: %s", self._what, error.message)
        self._discard()

    def _discard(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.discard()


def _digest(etag: str, size: int) -> "hashlib._Hash | None":
    """What computes the digest that an ETag of the hub is; None for one of another kind.

    Git's: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    """
    if len(etag) == _SHA256_DIGITS:
        return hashlib.sha256()
    if len(etag) == _SHA1_DIGITS:
        return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    return None
