"""Starts the batch job: one execution of `python -m exporter JOB_ID`."""

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dispatcher.contract import is_job_id
from dispatcher.errors import Misconfigured, Unavailable

logger = logging.getLogger(__name__)

EXPORTER = (sys.executable, "-P", "-m", "exporter")
"""`-P`: a folder named `exporter` where the command happens to be run must not be what runs."""
FAILED_FOR_GOOD = 1


@dataclass(frozen=True)
class Execution:
    """A started job: tasks retried under one name."""

    name: str
    log_uri: str


class JobRunner(Protocol):
    """Runs the exporter somewhere else; nothing waits for it."""

    def start(self, job_id: str, environment: Mapping[str, str]) -> Execution:
        """Start one execution with these variables besides the job's own.

        Raises:
            Unavailable: It was not started, or nobody knows whether it was.
        """

    def cancel(self, execution: str) -> None:
        """Ask an execution to stop; one that has ended, or that is not known here, is left alone."""


@dataclass
class _Run:
    job_id: str
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes]
    attempt: int = 0
    cancelled: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    exit_code: int | None = None


class ProcessRunner:
    """Executions as processes of their own session, so that they outlive a dispatcher that dies.

    Args:
        log_dir: One log file per execution lies here.
        environment: Variables that make the child open the same stores (`Settings.to_environment`).
        max_retries: How often a task that ends otherwise than with 0 or 1 is started again.
        retry_delay: Seconds before the first retry; it doubles each time.
        program: What is run, with the job id as its last argument.
    """

    def __init__(
        self,
        log_dir: Path,
        environment: Mapping[str, str],
        *,
        max_retries: int = 3,
        retry_delay: float = 0.5,
        program: Sequence[str] = EXPORTER,
    ) -> None:
        self._log_dir = log_dir
        self._environment = dict(environment)
        self._max_retries = max_retries
        self._retry_delay = retry_delay
        self._program = tuple(program)
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def start(self, job_id: str, environment: Mapping[str, str]) -> Execution:
        if not is_job_id(job_id):  # it becomes an argument and a file name
            raise Misconfigured(f"{job_id!r} is no job id: nothing was started")
        name = f"{job_id[:150]}-{secrets.token_hex(4)}"
        log = self._log_dir / f"{name}.log"
        wanted = {**self._environment, **environment, "CLOUD_RUN_EXECUTION": name}
        run = _Run(job_id, wanted, log, self._spawned(job_id, wanted, log, attempt=0))
        with self._lock:
            self._runs[name] = run
        threading.Thread(target=self._reap, args=(name, run), name=f"reap-{name}", daemon=True).start()
        return Execution(name, log.as_uri())

    def cancel(self, execution: str) -> None:
        with self._lock:
            run = self._runs.get(execution)
            if run is None or run.ended.is_set():
                return
            run.cancelled = True
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGTERM)

    def wait(self, execution: str, timeout: float | None = None) -> int | None:
        """The exit code of an execution's last task, or None when it has not ended or is not known here."""
        with self._lock:
            run = self._runs.get(execution)
        if run is None or not run.ended.wait(timeout):
            return None
        return run.exit_code

    def is_busy(self, job_id: str) -> bool:
        """Whether an execution of this job, started here, has not ended."""
        with self._lock:
            return any(run.job_id == job_id and not run.ended.is_set() for run in self._runs.values())

    def close(self) -> None:
        """Stop retrying; what runs goes on, since a dispatcher that ends must not end the work."""
        self._closed.set()

    def _spawned(
        self, job_id: str, environment: Mapping[str, str], log: Path, *, attempt: int
    ) -> subprocess.Popen[bytes]:
        variables = {**os.environ, **environment, "CLOUD_RUN_TASK_ATTEMPT": str(attempt)}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                return subprocess.Popen(
                    [*self._program, job_id],
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise Unavailable(f"the exporter could not be started: {error}") from error

    def _reap(self, name: str, run: _Run) -> None:
        while True:
            code = run.process.wait()
            logger.info("execution %s, attempt %d: ended with %d", name, run.attempt, code)
            final = code in (0, FAILED_FOR_GOOD) or run.attempt >= self._max_retries
            if final or run.cancelled or self._closed.wait(self._retry_delay * 2**run.attempt):
                break
            with self._lock:  # a cancel must see either the old task or the new one
                if run.cancelled:
                    break
                try:
                    run.process = self._spawned(run.job_id, run.environment, run.log, attempt=run.attempt + 1)
                except Unavailable as error:
                    logger.warning("execution %s was not tried again: %s", name, error)
                    break
                run.attempt += 1
        run.exit_code = code
        run.ended.set()


def open_runner(url: str, *, log_dir: Path, environment: Mapping[str, str]) -> JobRunner:
    """The runner that a URL selects: `process:` or `run://project/region/job`."""
    if url == "process:":
        return ProcessRunner(log_dir, environment)
    if url.startswith("run://"):
        raise Misconfigured(f"runner {url!r}: Cloud Run is not in this build yet", code="not_available_yet")
    raise Misconfigured(f"runner {url!r}: expected process: or run://project/region/job")
