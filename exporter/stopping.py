"""When this process is to stop, and that it does: work that cannot be told in time is ended under its feet.

Cloud Run kills 10 s after SIGTERM. Work asks at each step whether to stop; but a read from a socket that says nothing,
or one long call into a library, may not come to the next step in time. So a thread of its own gives back what the
process holds, and ends it.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

log = logging.getLogger(__name__)
WORK_SECONDS = 2.5
"""How long work has to stop by itself"""
LAST_SECONDS = 4.5
"""When the process ends after a signal, whatever was given back by then"""
LOG_SECONDS = 0.2
LEAVE_SECONDS = 1.0
"""How long work has to notice that what it did was cleared"""
TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h"""
_ENDS = "the work did not stop by itself in time: the process ends, and the next attempt goes on"


class Holder(Protocol):
    """What is under way, and can be given back without its own help."""

    def give_back(self) -> None:
        """Say in the record that it is not worked on any more, or remove what was written of a cancelled export.

        Called from another thread than the work's, which may still be at it.
        """


class Stop:
    """Says that the process is to stop, and knows what it would leave.

    Work may also come to its end by itself, so everything here may be called at any moment.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked_at: float | None = None
        self._holders: dict[Holder, float | None] = {}
        """And since when each is cancelled"""
        self._noticed: set[Holder] = set()

    def set(self) -> None:
        """Ask for the end: a signal came."""
        with self._changed:
            self._asked_at = self._asked_at or time.monotonic()
            self._changed.notify_all()

    def is_set(self) -> bool:
        """Whether the process is to stop."""
        return self._asked_at is not None

    @contextlib.contextmanager
    def holding(self, holder: Holder) -> Iterator[None]:
        """While something is held that would have to be given back."""
        with self._changed:
            self._holders[holder] = None
        try:
            yield
        finally:
            with self._changed:
                del self._holders[holder]
                self._noticed.discard(holder)
                self._changed.notify_all()

    def cancelled(self, holder: Holder) -> None:
        """The export of a holder was cancelled: its work has to end, whatever it is at."""
        with self._changed:
            if holder in self._holders:
                self._holders[holder] = time.monotonic()
                self._changed.notify_all()

    def noticed(self, holder: Holder) -> None:
        """The work of a cancelled holder knows it, and ends as soon as those let it that it works with."""
        self._noticed.add(holder)

    def on_signals(self) -> None:
        """Stop at SIGTERM and at a first Ctrl-C; a second Ctrl-C ends at once. To be called in the main thread.

        A handler of Python's runs between two of its instructions, which one call into a library can keep from it; what
        the interpreter writes to the wake-up descriptor does not wait for that.
        """
        listening, told = socket.socketpair()
        told.setblocking(False)

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

        def listen() -> None:
            while listening.recv(1):
                self.set()

        signal.set_wakeup_fd(told.detach())
        threading.Thread(target=listen, name="signals", daemon=True).start()
        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)

    def enforce(self, leave: Callable[[int], object] = os._exit) -> None:
        """See from now on that the process ends when it is to stop, with `TRY_AGAIN` where the work does not let it.

        Args:
            leave: Ends the process.
        """

        def enforced() -> None:
            while not self._ended():
                pass
            # In a thread: a log that nobody reads must not hold up the end.
            said = threading.Thread(target=log.warning, args=(_ENDS,), daemon=True)
            said.start()
            said.join(LOG_SECONDS)
            leave(TRY_AGAIN)

        threading.Thread(target=enforced, name="last resort", daemon=True).start()

    def _ended(self) -> bool:
        """Wait until work was to have stopped; whether everything is given back, so that the process can be ended."""
        with self._changed:
            while (due := self._due()) is None or due > time.monotonic():
                self._changed.wait(None if due is None else due - time.monotonic())
            asked, cancelled = self.is_set(), [holder for holder, since in self._holders.items() if since is not None]
        if not asked:
            self._give_back(cancelled, until=self._is_overdue)
            if self._gone(cancelled, until=self._is_overdue) or self._is_left_to_others(cancelled):
                return False
        with self._changed:
            held = list(self._holders)
        if held:
            self._give_back(held, until=self._is_last)
        elif self.is_set():
            self._wait_for_last()
        else:
            return False
        return True

    def _is_left_to_others(self, cancelled: list[Holder]) -> bool:
        """Whether what was cancelled, and cleared, only waits for others, whose work must not end with it."""
        with self._changed:
            still = [holder for holder in cancelled if holder in self._holders]
            others = self._holders.keys() - set(still)
            if self.is_set() or not others or not self._noticed.issuperset(still):
                return False
            self._holders.update(dict.fromkeys(still))
        return True

    def _due(self) -> float | None:
        since = [since for since in self._holders.values() if since is not None]
        first = min([*since, *([] if self._asked_at is None else [self._asked_at])], default=None)
        return None if first is None else first + WORK_SECONDS

    def _give_back(self, holders: list[Holder], *, until: Callable[[], bool]) -> None:
        """All at once, since each may wait for a store that does not answer."""
        threads = [threading.Thread(target=holder.give_back, daemon=True) for holder in holders]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not until():
                thread.join(0.05)

    def _gone(self, holders: list[Holder], *, until: Callable[[], bool]) -> bool:
        """Whether work comes to its end after all."""
        last = time.monotonic() + (LAST_SECONDS - WORK_SECONDS if self.is_set() else LEAVE_SECONDS)
        with self._changed:
            while any(holder in self._holders for holder in holders):
                left = last - time.monotonic()
                if left <= 0 or until():
                    return False
                self._changed.wait(min(left, 0.05))
        return True

    def _wait_for_last(self) -> None:
        """Nothing is held that could be lost: work may take all its time."""
        while not self._is_last():
            time.sleep(0.05)

    def _is_overdue(self) -> bool:
        return self._asked_at is not None and time.monotonic() > self._asked_at + WORK_SECONDS

    def _is_last(self) -> bool:
        return self._asked_at is not None and time.monotonic() > self._asked_at + LAST_SECONDS
