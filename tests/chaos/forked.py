"""Exporters as processes of their own that begin at once: forked from a process that has imported the libraries.

What runs in each is `exporter.__main__.main`, with an environment of its own. Python and torch alone take seconds to
start, and a hundred restarts would be measured in those.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.chaos.steps import Then, arrange

PRELOADED = (
    "exporter.__main__",
    "exporter.job",
    "exporter.gguf",
    "exporter.streaming",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma3.modeling_gemma3",
    "conversion.gemma",
    "gguf",
    "llama_cpp",
)
"""What an exporter of a Gemma 3 imports on its way; one that is missing here is imported by each child"""


class Exporter:
    """A started exporter.

    Args:
        arguments: After `python -m exporter`.
        environment: All of its variables.
        log: What it prints goes there.
        then: What happens to it at steps of its work.
        clock_seconds: How far its clock is ahead of everybody's.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        then: Sequence[Then] = (),
        clock_seconds: float = 0.0,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        self.log = log
        work = (tuple(arguments), dict(environment), log, tuple(then), clock_seconds)
        self._process = context.Process(target=_main, args=work, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status (negative: the signal it died of); None where it has none after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP keeps it from running."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] == "T"

    def kill(self) -> None:
        """End it, whatever it is at, and wait for that."""
        self.signal(signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-3000:]


def _main(
    arguments: Sequence[str], environment: dict[str, str], log: Path, then: Sequence[Then], clock_seconds: float
) -> None:
    """What the child runs."""
    os.setsid()  # a Ctrl-C is for whoever started it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # or it would be that of the process that was forked
    if clock_seconds:
        _shift_clock(timedelta(seconds=clock_seconds))
    arrange(then)
    from exporter.__main__ import main

    sys.exit(main(arguments))


def _shift_clock(ahead: timedelta) -> None:
    """Put the exporter's clock forward, or back, wherever it was imported to."""
    from exporter import job, lease, order

    real = lease.utc_now

    def shifted() -> datetime:
        return real() + ahead

    modules: tuple[Any, ...] = (job, lease, order)
    for module in modules:
        assert module.utc_now is real
        module.utc_now = shifted
