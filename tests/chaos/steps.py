"""What happens to an exporter at a step of its work, told by what it is about to do to files: from within its process.

Python tells an audit hook of each such call before it is made (https://docs.python.org/3/library/audit_events.html). So
a process can be stopped between two of them exactly, however fast one follows the other.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A call that is about to be made."""

    name: str
    """What it means, in plain words"""
    event: str
    """Which call: `open`, `os.link`, `os.remove`, `os.rmdir`, `subprocess.Popen`"""
    pattern: str
    """A regular expression that is found in its arguments"""
    skip: int = 0
    """How many such calls are let pass before"""


@dataclass(frozen=True)
class Then:
    """What happens at a step, once."""

    step: Step
    number: signal.Signals | None
    """The process gets this signal; with None the thread that came to the step waits instead."""
    seconds: float = 0.0
    """From the step to the signal, while the work goes on; or how long the thread waits"""


def arrange(happenings: Sequence[Then]) -> None:
    """Have these happen to this process, one after the other: each waits for the one before.

    An audit hook cannot be taken away again: this is for a process that is used up.
    """
    if not happenings:
        return
    coming, lock = list(happenings), threading.Lock()
    passed = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal passed
        if not coming or event != coming[0].step.event:
            return
        text = " ".join(map(str, arguments))
        with lock:
            if not coming or event != coming[0].step.event or not re.search(coming[0].step.pattern, text):
                return
            passed += 1
            if passed <= coming[0].step.skip:
                return
            due, passed = coming.pop(0), 0
        _happen(due)

    sys.addaudithook(hook)


def _happen(due: Then) -> None:
    if due.number is None:
        time.sleep(due.seconds)
    elif not due.seconds:
        os.kill(os.getpid(), due.number)
    else:
        timer = threading.Timer(due.seconds, os.kill, (os.getpid(), due.number))
        timer.daemon = True
        timer.start()
