"""Programs that run in a process of their own: with no secret in their environment, and never longer than this one."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.5
FIRST_POLL_SECONDS = 0.02
INHERITED = (
    "PATH",
    "PYTHON",
    "LD_",
    "LANG",
    "LC_",
    "HOME",
    "TMP",
    "TEMP",
    "CUDA",
    "NVIDIA_",
    "OMP_",
    "MKL_",
    "VIRTUAL_",
)


def environment(**more: str) -> dict[str, str]:
    """What a program needs of this process's environment, and `more`."""
    return {name: value for name, value in os.environ.items() if name.startswith(INHERITED)} | more


def run_child(
    command: Sequence[str],
    place: Path,
    *,
    environment: Mapping[str, str],
    while_waiting: Callable[[], None],
    seconds: float | None = None,
) -> int | None:
    """Run a program to its end, or to that of this process: its standard input is a pipe that then closes.

    Args:
        command: What to run.
        place: Its working directory; what it prints is kept there in the file `log`.
        environment: All of its environment.
        while_waiting: Called now and then; what it raises stops the program.
        seconds: How long it may take.

    Returns:
        Its exit status (negative: the signal that it died of), or None if it took too long.
    """
    last = None if seconds is None else time.monotonic() + seconds
    poll = FIRST_POLL_SECONDS
    with (
        (place / "log").open("wb") as said,
        subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=place,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C is for the exporter, which then stops it
        ) as process,
    ):
        try:
            while last is None or time.monotonic() < last:
                try:
                    return process.wait(poll)
                except subprocess.TimeoutExpired:
                    while_waiting()
                    poll = min(2 * poll, POLL_SECONDS)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started


def end_with_parent() -> None:
    """Called in a child: end it when its standard input closes, which is when its parent is gone."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
