"""One line for each step of `python -m infra.images`, and programs that end when the time is up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

WIDTH = 96
_LAST_LINES = 40


class StepFailed(Exception):
    """A step of an image's went wrong; the message says which program, and the last that it said."""


class Report:
    """The steps, as they are done, within so many seconds altogether."""

    def __init__(self, log: Path, *, seconds: float) -> None:
        """Keep what programs say in a file."""
        self._log = log
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self.steps = 0

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step: its line is written when it is done, or has failed."""
        began = time.monotonic()
        line = what if len(what) <= WIDTH else f"{what[: WIDTH - 1]}…"
        try:
            yield
        except BaseException:
            say(f"FAILED   {line}")
            raise
        self.steps += 1
        say(f"{time.monotonic() - began:6.1f} s {line}")

    def seconds(self) -> float:
        """How long it has been at work."""
        return time.monotonic() - self._began

    def left(self) -> float:
        """The seconds that are left.

        Raises:
            StepFailed: There are none.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StepFailed("the time is up: nothing was wrong but that it took too long")
        return left

    def run(self, command: Sequence[str], *, environment: Mapping[str, str], place: Path) -> str:
        """Run a program to its end, and return what it said.

        Raises:
            StepFailed: It ended with another status than 0, or not in time; it is ended with all that it started.
        """
        left = self.left()
        with (
            self._log.open("w+b") as said,
            subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=dict(environment),
                cwd=place,
                start_new_session=True,
            ) as process,
        ):
            try:
                status: int | str = process.wait(left)
            except subprocess.TimeoutExpired:
                status = f"no end after {left:.0f} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        text = self._log.read_text(errors="replace")
        if status != 0:
            tail = "\n".join(f"  {line}" for line in text.rstrip().splitlines()[-_LAST_LINES:])
            raise StepFailed(f"{' '.join(command)[:300]}: {status}. The last that it said:\n{tail}")
        return text


def say(line: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
