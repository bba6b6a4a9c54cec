"""Waits for a condition with a deadline, so that no test ever guesses how long something takes."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(probe: Callable[[], T | None], what: str, *, seconds: float = 60) -> T:
    """The first true value of `probe`; fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    tick = threading.Event()
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        tick.wait(0.01)
