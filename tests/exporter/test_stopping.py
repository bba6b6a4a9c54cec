"""The end of a process: within five seconds of a signal, with nothing held that nobody works on."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue

import pytest

from exporter import stopping
from exporter.stopping import TRY_AGAIN, Stop
from tests.waiting import until


class Held:
    """Something that is given back slowly, or never."""

    def __init__(self, giving_back: Callable[[], object] = lambda: None) -> None:
        self._giving_back = giving_back
        self.given_back = threading.Event()

    def give_back(self) -> None:
        self._giving_back()
        self.given_back.set()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time."""
    monkeypatch.setattr(stopping, "WORK_SECONDS", 0.25)
    monkeypatch.setattr(stopping, "LAST_SECONDS", 0.45)


def left(stop: Stop) -> "Queue[int]":
    """Where the exit code comes when the process would end."""
    codes: Queue[int] = Queue()
    stop.enforce(leave=codes.put)
    return codes


@pytest.mark.usefixtures("hasty")
def test_what_hangs_at_a_signal_is_given_back_and_the_process_ends() -> None:
    """All that it holds."""
    stop, holders = Stop(), [Held(), Held()]
    codes = left(stop)
    with stop.holding(holders[0]), stop.holding(holders[1]):
        stop.set()
        assert stop.is_set()
        assert codes.get(timeout=5) == TRY_AGAIN
    assert all(holder.given_back.is_set() for holder in holders)


@pytest.mark.usefixtures("hasty")
def test_a_store_that_does_not_answer_does_not_hold_up_the_end() -> None:
    """Its lease will run out."""
    stop, never = Stop(), threading.Event()
    held, other = Held(never.wait), Held()
    codes = left(stop)
    with stop.holding(held), stop.holding(other):
        began = time.monotonic()
        stop.set()
        assert codes.get(timeout=5) == TRY_AGAIN
        assert 0.4 < time.monotonic() - began < 2
    assert other.given_back.is_set()
    assert not held.given_back.is_set()
    never.set()


@pytest.mark.usefixtures("hasty")
def test_work_that_stops_by_itself_is_not_interfered_with() -> None:
    """What it holds it gives back itself."""
    stop, held = Stop(), Held()
    with stop.holding(held):
        stop.set()
    codes = left(stop)
    with pytest.raises(Empty):
        codes.get(timeout=0.35)
    assert codes.get(timeout=5) == TRY_AGAIN  # as something else hangs
    assert not held.given_back.is_set()


@pytest.mark.usefixtures("hasty")
def test_of_several_exports_the_cancelled_one_alone_is_cleared_where_its_work_then_ends() -> None:
    """The others go on."""
    stop, cancelled, other, over = Stop(), Held(), Held(), threading.Event()
    codes = left(stop)

    def work() -> None:
        with stop.holding(cancelled):
            stop.cancelled(cancelled)
            over.wait()

    thread = threading.Thread(target=work)
    with stop.holding(other):
        thread.start()
        assert cancelled.given_back.wait(5)
        over.set()
        thread.join()
        with pytest.raises(Empty):
            codes.get(timeout=0.5)
    assert not other.given_back.is_set()


@pytest.mark.usefixtures("hasty")
def test_cancelled_work_that_never_ends_takes_the_process_along() -> None:
    """Which another attempt follows, for the others."""
    stop, cancelled, other = Stop(), Held(), Held()
    codes = left(stop)
    with stop.holding(cancelled), stop.holding(other):
        stop.cancelled(cancelled)
        assert codes.get(timeout=5) == TRY_AGAIN
    assert cancelled.given_back.is_set()
    assert other.given_back.is_set()


@pytest.mark.usefixtures("hasty")
def test_clearing_what_was_cancelled_may_take_its_time_until_a_signal_comes() -> None:
    """Many files, say."""
    stop, go = Stop(), threading.Event()
    held = Held(go.wait)
    codes = left(stop)
    with stop.holding(held):
        stop.cancelled(held)
        with pytest.raises(Empty):
            codes.get(timeout=1)
        stop.set()
        assert codes.get(timeout=5) == TRY_AGAIN
    go.set()


@pytest.mark.usefixtures("hasty")
def test_cancelled_work_that_only_waits_for_others_does_not_end_theirs() -> None:
    """It knows, and what it wrote is gone; a signal still ends them all."""
    stop, cancelled, other = Stop(), Held(), Held()
    codes = left(stop)
    with stop.holding(cancelled), stop.holding(other):
        stop.cancelled(cancelled)
        stop.noticed(cancelled)
        assert cancelled.given_back.wait(5)
        with pytest.raises(Empty):
            codes.get(timeout=2)
        assert not other.given_back.is_set()
        stop.set()
        assert codes.get(timeout=5) == TRY_AGAIN
        assert other.given_back.is_set()


@pytest.mark.usefixtures("hasty")
def test_a_signal_releases_the_others_while_what_was_cancelled_cannot_be_cleared() -> None:
    """Each for itself."""
    stop, never = Stop(), threading.Event()
    cancelled, other = Held(never.wait), Held()
    codes = left(stop)
    with stop.holding(cancelled), stop.holding(other):
        stop.cancelled(cancelled)
        time.sleep(0.5)
        stop.set()
        assert codes.get(timeout=5) == TRY_AGAIN
    assert other.given_back.is_set()
    never.set()


@pytest.mark.usefixtures("hasty")
def test_a_log_that_nobody_reads_does_not_hold_up_the_end() -> None:
    """A pipe that is full, say."""
    never = threading.Event()

    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            never.wait()

    handler = Full()
    stopping.log.addHandler(handler)
    try:
        stop = Stop()
        codes = left(stop)
        with stop.holding(Held()):
            stop.set()
            assert codes.get(timeout=5) == TRY_AGAIN
    finally:
        never.set()
        stopping.log.removeHandler(handler)


PROGRAM = textwrap.dedent(
    """
    import hashlib, pathlib, sys
    from exporter.stopping import Stop

    class Held:
        def give_back(self):
            pathlib.Path(sys.argv[1], "given back").touch()

    stop = Stop()
    stop.on_signals()
    stop.enforce()
    with stop.holding(Held()):
        pathlib.Path(sys.argv[1], "ready").touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one long call, which Python's handlers wait for
    """
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_one_long_call_into_a_library(tmp_path: Path, number: signal.Signals) -> None:
    """The main thread runs no handler of Python's until that returns."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env={**os.environ})
    try:
        until(lambda: (tmp_path / "ready").exists(), "the call")
        time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == TRY_AGAIN
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "given back").exists()
