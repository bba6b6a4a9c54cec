"""Several files of one export at once: the first fault stops all of them, and their progress is one."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from exporter.lease import Report
from exporter.making import WRITE_FROM, WRITE_TO

TRANSFER_BYTES = 96 << 20
"""About what one file takes on its way from the hub to a bucket: chunks that are read ahead, copied, and uploaded."""
WAIT_SECONDS = 0.5

Item = TypeVar("Item")
Done = TypeVar("Done")


class Progress:
    """Bytes done of an export, told as a part of its progress; for many threads.

    Args:
        report: Told of it; what it raises stops whoever adds.
        stage: What is being done.
        total: Bytes in all.
        done: Of them, those that were done before.
    """

    def __init__(self, report: Report, stage: str, total: int, done: int = 0) -> None:
        self._report = report
        self._stage = stage
        self._total = max(1, total)
        self._done = done
        self._fault: BaseException | None = None
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What the block raises stops all others who add."""
        try:
            yield
        except BaseException as error:
            self._fault = self._fault or error
            raise

    def add(self, count: int) -> None:
        """Count more bytes; raises what `report` does, or what stopped another."""
        if self._fault is not None:
            raise self._fault
        with self._lock:
            self._done += count
            fraction = min(1.0, self._done / self._total)
        self._report(self._stage, WRITE_FROM + (WRITE_TO - WRITE_FROM) * fraction)


@contextmanager
def one_at_a_time(lock: threading.Lock, while_waiting: Callable[[], object]) -> Iterator[None]:
    """Holds a lock that other exports of this process may hold for long.

    Args:
        lock: The lock.
        while_waiting: Called now and then; what it raises ends the wait.
    """
    while not lock.acquire(timeout=WAIT_SECONDS):
        while_waiting()
    try:
        yield
    finally:
        lock.release()


def side_by_side(make: Callable[[Item], Done], items: Sequence[Item], lanes: int) -> list[Done]:
    """What `make` returns for each item, in their order, a few at a time.

    Args:
        make: Makes one.
        items: All of them.
        lanes: How many at a time, at least one.

    Raises:
        Exception: What the first `make` raised; those under way are waited for, and no other is begun.
    """
    if len(items) <= 1 or lanes <= 1:
        return [make(item) for item in items]
    with ThreadPoolExecutor(min(lanes, len(items)), thread_name_prefix="lane") as pool:
        made = [pool.submit(contextvars.copy_context().run, make, item) for item in items]
        wait(made, return_when=FIRST_EXCEPTION)
        for future in made:
            future.cancel()
        for future in made:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in made]
