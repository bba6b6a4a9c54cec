"""Reading, making and writing side by side: each step in order, in a few buffers.

The calling thread reads, worker threads make, one thread writes. The buffers are used over and over, because allocating
(and first touching) memory is what a naive loop spends its time on; as long as one is free, the reading goes ahead.
"""

import contextvars
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

BUFFERS_AHEAD = 3
"""Buffers that are read into, or wait to be written, while every worker fills another."""

Room = TypeVar("Room")
Told = TypeVar("Told")


def worker_count() -> int:
    """As many threads as there are cores; those that read and write mostly wait for the kernel."""
    return max(1, os.cpu_count() or 1)


class Pipeline(Generic[Room]):
    """Workers, each with room of its own, between a reader and a writer.

    Args:
        buffer_bytes: The size of each buffer.
        make_room: Makes what a worker needs for itself; called once in each.
        workers: How many; more than there are cores where they also wait for what they read.
    """

    def __init__(self, buffer_bytes: int, make_room: Callable[[], Room], *, workers: int) -> None:
        self._free = deque(bytearray(buffer_bytes) for _ in range(workers + BUFFERS_AHEAD))
        self._under_way: deque[tuple[Future[None], bytearray]] = deque()
        self._make_room = make_room
        self._rooms = threading.local()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="fold")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._has_failed = False

    def __enter__(self) -> "Pipeline[Room]":
        return self

    def __exit__(self, *_: object) -> None:
        self._has_failed = True  # what is still under way has nobody to wait for it
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True, cancel_futures=True)

    def put(
        self,
        read: Callable[[bytearray], object],
        fill: Callable[[bytearray, Room], Told],
        hand_on: Callable[[bytearray, Told], None],
    ) -> None:
        """Send a buffer through: `read` in the calling thread, `fill` in a worker, `hand_on` in the one that writes.

        Raises:
            Exception: Whatever `read` raised, or an earlier `fill` or `hand_on`.
        """
        if not self._free:
            self._wait()
        buffer = self._free.popleft()
        read(buffer)
        filled = self._workers.submit(self._filled, fill, buffer)
        # Log lines of what writes belong to the export whose ids this context has.
        context = contextvars.copy_context()
        self._under_way.append((self._writer.submit(context.run, self._handed_on, filled, buffer, hand_on), buffer))

    def drain(self) -> None:
        """Wait until all that is under way was handed on; raises as `put`."""
        while self._under_way:
            self._wait()

    def _filled(self, fill: Callable[[bytearray, Room], Told], buffer: bytearray) -> Told:
        if not hasattr(self._rooms, "room"):
            self._rooms.room = self._make_room()
        return fill(buffer, self._rooms.room)

    def _handed_on(self, filled: Future[Any], buffer: bytearray, hand_on: Callable[[bytearray, Any], None]) -> None:
        if self._has_failed:
            return
        try:
            hand_on(buffer, filled.result())
        except BaseException:
            self._has_failed = True
            raise

    def _wait(self) -> None:
        handed_on, buffer = self._under_way.popleft()
        handed_on.result()
        self._free.append(buffer)
