"""Bases kept in the artifact bucket, `base_models/{repo}@{commit}/`, so that the hub is read once per revision.

A file is copied there while it is read for a merge. Whether a caller may use it is never the cache's to say: the hub
itself is asked before, with the caller's own token (`hub.look_up`).
"""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

from dispatcher.artifacts import ArtifactStore, StoredFile, is_bucket
from dispatcher.published import BASES_ROOT
from exporter.byte_source import ByteReader, ByteSource, ByteStream
from exporter.hub_copy import RECORD, Copy, record_of
from exporter.hub_file import HubFile
from exporter.lease import Hold, Report
from exporter.making import WRITE_FROM
from exporter.side_by_side import one_at_a_time
from exporter.sources import Base, Opener, open_base, open_streamed
from exporter.stored_object import StoredObject
from exporter.tasks import Tasks

log = logging.getLogger(__name__)
BLOCK_BYTES = 4 << 20
_FILLING = threading.Lock()
"""Held by the one export that copies a base before it reads it: others then find the copy."""


def opener_for(store: ArtifactStore, hold: Hold) -> Opener:
    """How a base is opened: where artifacts are in a bucket, none of its weights is put on this machine's disk."""
    return partial(open_streamed if is_bucket(store) else open_base, while_waiting=hold.check)


def cached(base: Base, store: ArtifactStore | None) -> Base:
    """A base of the hub whose weights come from the bucket where they are there, and else are copied to it.

    A copy is what the bucket lists with the size and crc32c that its record says; the record is written when the bytes
    have proved to be the hub's.

    Args:
        base: What `open_streamed` gave.
        store: Whose bucket; None keeps nothing, and still checks what is read whole.

    Raises:
        ExportError: The store cannot be read.
    """
    if base.weights is None:
        return base
    directory = f"{BASES_ROOT}/{base.model_id}@{base.revision}"
    there = _copies(store, directory) if store is not None and is_bucket(store) else {}
    weights: dict[str, ByteSource] = {}
    for name, source in base.weights.items():
        path = f"{directory}/{name}"
        if store is not None and name in there and there[name].size == source.size:
            weights[name] = StoredObject(name, store.open(store.uri(path)))
        else:
            weights[name] = _CheckedFile(source, store, path) if isinstance(source, HubFile) else source
    stored = sum(isinstance(source, StoredObject) for source in weights.values())
    log.info("%d of %d weight files are in %s", stored, len(weights), directory)
    return base.reading(weights)


def _copies(store: ArtifactStore, directory: str) -> dict[str, StoredFile]:
    """The files of a directory that are what their records say, by name."""
    listed = {file.name: file for file in store.list(store.uri(directory), checksums=False)}
    found = {}
    for name, file in listed.items():
        record = f"{name}{RECORD}"
        if record in listed and store.read(store.uri(f"{directory}/{record}")) == record_of(file):
            found[name] = file
    return found


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
        if not isinstance(source, _CheckedFile):
            continue
        with source.open(whole=True) as reader, reader.stream(0, source.size) as stream:
            for start in range(0, source.size, BLOCK_BYTES):
                block = buffer[: min(BLOCK_BYTES, source.size - start)]
                stream.read_into(block)
                on_bytes(len(block))


@dataclass(frozen=True)
class _CheckedFile:
    """A file on the hub whose digest is checked when it is read whole, and of which a copy is kept then."""

    source: HubFile
    store: ArtifactStore | None
    """Where a copy goes; None where none is kept"""
    path: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        return self.source.size

    def open(self, *, whole: bool = False) -> ByteReader:
        return _CheckingReader(self) if whole else self.source.open()


class _CheckingReader:
    """Reads a file and copies every byte of it, in order, whatever of it is asked for and however often."""

    def __init__(self, file: _CheckedFile) -> None:
        self._file = file
        self._reader = file.source.open()
        self._copy = Copy(file.store, file.path, file.size, file.source.etag)

    def read_into(self, view: memoryview, offset: int) -> None:
        self._reader.read_into(view, offset)

    def stream(self, start: int, stop: int) -> ByteStream:
        if start > self._copy.size:
            self._skip_to(start)
        stream = self._reader.stream(start, stop)
        return _CheckingStream(stream, self._copy) if start == self._copy.size else stream

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(self, *exit: object) -> None:
        try:
            if exit[0] is None:
                self._skip_to(self._file.size)
                self._copy.commit()
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


class _CheckingStream:
    def __init__(self, stream: ByteStream, copy: Copy) -> None:
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
