"""Bases kept in the artifact bucket, `base_models/{repo}@{commit}/`, so that the hub is read once per revision.

A file is copied there while it is read for a merge. Whether a caller may use it is never the cache's to say: the hub
itself is asked before, with the caller's own token (`hub.look_up`).
"""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from dispatcher.artifacts import ArtifactStore, ArtifactWriter, is_bucket
from dispatcher.errors import ExportError, Unavailable
from exporter.byte_source import ByteReader, ByteSource, ByteStream
from exporter.hub_file import HubFile
from exporter.lease import Report
from exporter.making import WRITE_FROM
from exporter.side_by_side import one_at_a_time
from exporter.sources import Base, Opener, open_base, open_streamed
from exporter.stored_object import StoredObject
from exporter.tasks import Tasks

log = logging.getLogger(__name__)
ROOT = "base_models"
BLOCK_BYTES = 4 << 20
BLOCKS_AHEAD = 2
"""Blocks of a copy that wait to be uploaded."""
_SHA256_DIGITS = 64
_FILLING = threading.Lock()
"""Held by the one export that copies a base before it reads it: others then find the copy."""


def opener_for(store: ArtifactStore) -> Opener:
    """How a base is opened: where artifacts are in a bucket, none of its weights is put on this machine's disk."""
    return open_streamed if is_bucket(store) else open_base


def cached(base: Base, store: ArtifactStore) -> Base:
    """A base of the hub whose weights come from the bucket where they are there, and else are copied to it.

    Args:
        base: What `open_streamed` gave.
        store: Whose bucket.

    Raises:
        ExportError: The store cannot be read.
    """
    if base.weights is None or not is_bucket(store):
        return base
    directory = f"{ROOT}/{base.model_id}@{base.revision}"
    there = {file.name: file.size for file in store.list(store.uri(directory), checksums=False)}
    weights: dict[str, ByteSource] = {}
    for name, source in base.weights.items():
        path = f"{directory}/{name}"
        if there.get(name) == source.size:
            weights[name] = StoredObject(name, store.open(store.uri(path)))
        else:
            weights[name] = _KeptFile(source, store, path) if isinstance(source, HubFile) else source
    log.info("%d of %d weight files are in %s", len(there.keys() & weights.keys()), len(weights), directory)
    return base.reading(weights)


def filled(base: Base, store: ArtifactStore, tasks: Tasks, report: Report) -> Base:
    """As `cached`, after this task's part of what the bucket lacks was copied there.

    For what does not read the files from front to back. What is other tasks' to copy, and not there yet, is read from
    the hub.

    Args:
        base: What `open_streamed` gave.
        store: Whose bucket.
        tasks: Which part is this task's.
        report: Told of stage and fraction; what it raises stops the work.

    Raises:
        ExportError: The hub does not deliver a file, or the store cannot be read.
    """
    if base.weights is None or not is_bucket(store):
        return base
    names = sorted(base.weights)
    mine = tasks.deal(names, [base.weights[name].size for name in names])
    total = sum(base.weights[name].size for name in mine)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        report("fetching", WRITE_FROM / 2 * done / total)

    with one_at_a_time(_FILLING, lambda: report("fetching", 0.0)):
        fill(cached(base, store), mine, on_bytes)
    return cached(base, store)


def fill(base: Base, names: Iterable[str], on_bytes: Callable[[int], None]) -> None:
    """Copy weight files of a base, as `cached` gave it, into the bucket, those that are not there yet.

    Args:
        base: The base.
        names: Which files.
        on_bytes: Told of every block, in bytes; what it raises stops the work.

    Raises:
        ExportError: The hub does not deliver a file. That a copy cannot be kept is no error.
    """
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for name in names:
        source = (base.weights or {})[name]
        if not isinstance(source, _KeptFile):
            continue
        with source.open(whole=True) as reader, reader.stream(0, source.size) as stream:
            for start in range(0, source.size, BLOCK_BYTES):
                block = buffer[: min(BLOCK_BYTES, source.size - start)]
                stream.read_into(block)
                on_bytes(len(block))


@dataclass(frozen=True)
class _KeptFile:
    """A file on the hub of which a copy is kept when it is read whole."""

    source: HubFile
    store: ArtifactStore
    path: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        return self.source.size

    def open(self, *, whole: bool = False) -> "ByteReader":
        return _KeepingReader(self) if whole else self.source.open()


class _KeepingReader:
    """Reads a file and copies every byte of it, in order, whatever of it is asked for and however often."""

    def __init__(self, file: _KeptFile) -> None:
        self._file = file
        self._reader = file.source.open()
        self._copy = _Copy(file.store, file.path, file.size)

    def read_into(self, view: memoryview, offset: int) -> None:
        self._reader.read_into(view, offset)

    def stream(self, start: int, stop: int) -> ByteStream:
        if start > self._copy.size:
            self._skip_to(start)
        stream = self._reader.stream(start, stop)
        return _KeepingStream(stream, self._copy) if start == self._copy.size else stream

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(self, *exit: object) -> None:
        try:
            if exit[0] is None:
                self._skip_to(self._file.size)
                self._copy.commit(self._file.source.etag)
        finally:
            self._copy.close()
            self._reader.__exit__(*exit)

    def _skip_to(self, stop: int) -> None:
        """Copy what nobody asks for: the header, and a vocabulary that the adapter replaces."""
        if stop == self._copy.size:
            return
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with self._reader.stream(self._copy.size, stop) as stream:
            while self._copy.size < stop:
                block = buffer[: min(BLOCK_BYTES, stop - self._copy.size)]
                stream.read_into(block)
                self._copy.write(block)


class _KeepingStream:
    def __init__(self, stream: ByteStream, copy: "_Copy") -> None:
        self._stream = stream
        self._copy = copy

    def read_into(self, view: memoryview) -> None:
        self._stream.read_into(view)
        self._copy.write(view)

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(self, *exit: object) -> None:
        self._stream.__exit__(*exit)


class _Copy:
    """A file on its way into the bucket, in a thread of its own; that it cannot be kept fails nobody.

    Args:
        store, path: Where to.
        size: Bytes of the whole file.
    """

    def __init__(self, store: ArtifactStore, path: str, size: int) -> None:
        self.size = 0
        """Bytes so far"""
        self._what = f"{path} ({size} bytes)"
        self._sha256 = hashlib.sha256()
        self._writer: ArtifactWriter | None = None
        self._under_way: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._begun = self._pool.submit(self._begin, store, path, size)

    def write(self, view: memoryview) -> None:
        """Append bytes; they are copied, since whoever reads goes on using the buffer."""
        self.size += len(view)
        if len(self._under_way) >= BLOCKS_AHEAD:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(self._write, bytes(view)))

    def commit(self, etag: str) -> None:
        """Publish the copy, if it is what the hub says that the file is.

        Args:
            etag: The hub's; of a large file, its SHA-256 in hexadecimal digits.

        Raises:
            Unavailable: What came is not the file (`base_damaged`).
        """
        self._pool.submit(self._finish, etag).result()

    def close(self) -> None:
        """Give up what was not committed."""
        self._pool.submit(self._discard).result()
        self._pool.shutdown()

    def _begin(self, store: ArtifactStore, path: str, size: int) -> None:
        try:
            self._writer = store.create(path, size=size)
        except ExportError as error:
            self._give_up(error)

    def _write(self, block: bytes) -> None:
        self._sha256.update(block)
        if self._writer is not None:
            try:
                self._writer.write(block)
            except ExportError as error:
                self._give_up(error)

    def _finish(self, etag: str) -> None:
        found = self._sha256.hexdigest()
        if len(etag) == _SHA256_DIGITS and found != etag:
            raise Unavailable(
                f"{self._what} did not arrive as the hub has it: its SHA-256 is {found}, {etag} was expected. "
                "Nothing was published; try again.",
                code="base_damaged",
            )
        if self._writer is not None:
            try:
                self._writer.commit()
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
