"""A connection that carries only so many bytes a second, so that a bench can make the network what it waits for."""

import threading
import time
from io import BufferedIOBase

_SLICE = 64 << 10
_MADE_UP_SECONDS = 0.05
"""What a thread that is woken late makes up for, or a busy machine's connections would be slower than they are told."""


class Pace:
    """One direction of one connection; idle time is not made up for.

    Args:
        bytes_per_second: How many pass; None is as many as can.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._tick = threading.Event()

    def read(self, source: BufferedIOBase, length: int) -> bytes:
        """`length` bytes; fewer only where `source` ends."""
        if self._rate is None:
            return source.read(length)
        parts = []
        while length and (part := source.read(min(length, _SLICE))):
            self._wait(len(part), self._rate)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def write(self, target: BufferedIOBase, data: bytes) -> None:
        """All of `data`."""
        if self._rate is None:
            target.write(data)
            return
        for start in range(0, len(data), _SLICE):
            part = memoryview(data)[start : start + _SLICE]
            self._wait(part.nbytes, self._rate)
            target.write(part)

    def _wait(self, count: int, rate: float) -> None:
        now = time.monotonic()
        self._free_at = max(self._free_at, now - _MADE_UP_SECONDS) + count / rate
        self._tick.wait(max(0.0, self._free_at - now))
