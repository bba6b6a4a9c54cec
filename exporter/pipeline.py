"""Worker threads that fill buffers, and the calling thread that hands them on in order.

A few buffers are used over and over, because allocating (and first touching) memory is what a naive loop spends its
time on.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

BUFFERS_AHEAD = 2
"""Buffers that wait to be handed on while every worker fills another."""

Room = TypeVar("Room")
Told = TypeVar("Told")


def worker_count() -> int:
    """As many threads as there are cores; the one that writes mostly waits for the kernel."""
    return max(1, os.cpu_count() or 1)


def buffer_count() -> int:
    """How many buffers a pipeline has."""
    return worker_count() + BUFFERS_AHEAD


class Pipeline(Generic[Room]):
    """Workers, each with room of its own.

    Args:
        buffer_bytes: The size of each buffer.
        make_room: Makes what a worker needs for itself; called once in each.
    """

    def __init__(self, buffer_bytes: int, make_room: Callable[[], Room]) -> None:
        self._free = deque(bytearray(buffer_bytes) for _ in range(buffer_count()))
        self._under_way: deque[tuple[Future[Any], bytearray, Callable[[bytearray, Any], None]]] = deque()
        self._make_room = make_room
        self._rooms = threading.local()
        self._pool = ThreadPoolExecutor(worker_count(), thread_name_prefix="fold")

    def __enter__(self) -> "Pipeline[Room]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, fill: Callable[[bytearray, Room], Told], hand_on: Callable[[bytearray, Told], None]) -> None:
        """Have a worker fill a buffer; `hand_on` gets it, in the calling thread, after all that were put before.

        Raises:
            Exception: Whatever an earlier `fill` or `hand_on` raised.
        """
        if not self._free:
            self._hand_on()
        buffer = self._free.popleft()
        self._under_way.append((self._pool.submit(self._filled, fill, buffer), buffer, hand_on))

    def drain(self) -> None:
        """Hand on all that is under way; raises as `put`."""
        while self._under_way:
            self._hand_on()

    def _filled(self, fill: Callable[[bytearray, Room], Told], buffer: bytearray) -> Told:
        if not hasattr(self._rooms, "room"):
            self._rooms.room = self._make_room()
        return fill(buffer, self._rooms.room)

    def _hand_on(self) -> None:
        ready, buffer, hand_on = self._under_way.popleft()
        hand_on(buffer, ready.result())
        self._free.append(buffer)
