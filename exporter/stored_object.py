"""A published file of an artifact store as a source of bytes, of the generation that was there when it was opened."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from dispatcher.artifacts import ArtifactReader

CHUNK_BYTES = 8 << 20
CHUNKS_AHEAD = 2
"""How many requests of a stream are under way at once."""


@dataclass(frozen=True)
class StoredObject:
    """An open file of a store whose readers are pinned, and hold nothing open: Cloud Storage's."""

    name: str
    reader: ArtifactReader

    @property
    def size(self) -> int:
        return self.reader.size

    def open(self, *, whole: bool = False) -> "_ObjectReader":
        return _ObjectReader(self.reader)


class _ObjectReader:
    def __init__(self, reader: ArtifactReader) -> None:
        self._reader = reader

    def read_into(self, view: memoryview, offset: int) -> None:
        view[:] = self._reader.read(offset, len(view))

    def stream(self, start: int, stop: int) -> "_ReadAhead":
        return _ReadAhead(self._reader.read, start, stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""


class _ReadAhead:
    """A stream over requests for chunks, of which a few are always under way.

    Args:
        read: Reads (offset, length).
        start, stop: Which bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], start: int, stop: int) -> None:
        self._read = read
        self._chunks = iter(range(start, stop, CHUNK_BYTES))
        self._stop = stop
        self._under_way: deque[Future[bytes]] = deque()
        self._current = memoryview(b"")
        self._pool = ThreadPoolExecutor(CHUNKS_AHEAD, thread_name_prefix="read")

    def read_into(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            if not self._current:
                self._ask()
                if not self._under_way:
                    raise ValueError(f"{len(view) - done} bytes were asked of a stream beyond its end at {self._stop}")
                self._current = memoryview(self._under_way.popleft().result())
            part = self._current[: len(view) - done]
            view[done : done + len(part)] = part
            self._current = self._current[len(part) :]
            done += len(part)

    def _ask(self) -> None:
        while len(self._under_way) < CHUNKS_AHEAD and (start := next(self._chunks, None)) is not None:
            self._under_way.append(self._pool.submit(self._read, start, min(CHUNK_BYTES, self._stop - start)))

    def __enter__(self) -> Self:
        self._ask()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
