"""Starts the batch job: one execution of `python -m exporter JOB_ID`."""

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dispatcher.contract import is_job_id
from dispatcher.errors import Misconfigured, Unavailable

logger = logging.getLogger(__name__)

EXPORTER = (sys.executable, "-P", "-m", "exporter")
"""`-P`: a folder named `exporter` where the command happens to be run must not be what runs."""
FAILED_FOR_GOOD = 1
NOT_STARTED = 127
"""The code of a task that never began; what a shell says of a program that it cannot start."""


@dataclass(frozen=True)
class Execution:
    """A started job: tasks retried under one name."""

    name: str
    log_uri: str


class JobRunner(Protocol):
    """Runs the exporter somewhere else; nothing waits for it."""

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        """Start one execution with these variables besides the job's own.

        Each of its tasks finds its number, and how many there are, in CLOUD_RUN_TASK_INDEX and CLOUD_RUN_TASK_COUNT;
        each is tried again by itself, and none can count on another being at work at the same time.

        Raises:
            LaunchInDoubt: It may have been started: nobody knows.
            Unavailable: It was not started; it may be later.
            Misconfigured: It was not started, and will not be until somebody mends something.
        """

    def cancel(self, execution: str) -> None:
        """Ask an execution to stop, all its tasks; one that has ended, or that is not known here, is left alone.

        Raises:
            Unavailable: It may not have heard; ask again.
            Misconfigured: This service account may not stop it.
        """

    def close(self) -> None:
        """Release what this process holds; executions go on."""


@dataclass
class _Task:
    index: int
    process: subprocess.Popen[bytes] | None = None
    """None before it was first started."""
    attempt: int = 0
    exit_code: int | None = None
    """None until it has ended for good."""


@dataclass
class _Run:
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    tasks: list[_Task]
    unfinished: int
    """How many tasks have not ended for good."""
    places: threading.Semaphore
    """One for each task that may run now."""
    cancelled: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Of the tasks that were started."""
        return [task.process for task in self.tasks if task.process is not None]


class ProcessRunner:
    """Executions as processes of their own session, so that they outlive a dispatcher that dies.

    Args:
        log_dir: One log file per execution lies here.
        environment: Variables that make the child open the same stores (`Settings.to_environment`).
        max_retries: How often a task that ends with no final code is started again.
        retry_delay: Seconds before the first retry; it doubles each time.
        program: What is run, with the job id as its last argument.
        final_codes: The exit codes after which a task is not started again.
        inherits: Whether tasks also get the variables of this process.
        parallelism: How many tasks of an execution run at a time, the others after them; None is all.
    """

    def __init__(
        self,
        log_dir: Path,
        environment: Mapping[str, str],
        *,
        max_retries: int = 3,
        retry_delay: float = 0.5,
        program: Sequence[str] = EXPORTER,
        final_codes: Collection[int] = (0, FAILED_FOR_GOOD),
        inherits: bool = True,
        parallelism: int | None = None,
    ) -> None:
        self._log_dir = log_dir
        self._environment = dict(environment)
        self._max_retries = max_retries
        self._retry_delay = retry_delay
        self._program = tuple(program)
        self._final_codes = frozenset(final_codes)
        self._inherits = inherits
        self._parallelism = parallelism
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        if not is_job_id(job_id):  # it becomes an argument and a file name
            raise Misconfigured(f"{job_id!r} is no job id: nothing was started")
        return self.execute(f"{job_id[:150]}-{secrets.token_hex(4)}", (job_id,), environment, tasks=tasks)

    def execute(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], *, tasks: int = 1
    ) -> Execution:
        """Start one execution under a name of its own, with any arguments.

        Args:
            name: Not in use here yet, and fit to be a file's name.
            arguments: Given to the program.
            environment: Variables besides the runner's own.
            tasks: How many.

        Raises:
            Unavailable: It was not started.
        """
        log = self._log_dir / f"{name}.log"
        own = {"CLOUD_RUN_EXECUTION": name, "CLOUD_RUN_TASK_COUNT": str(tasks)}
        wanted = {**self._environment, **environment, **own}
        places = threading.Semaphore(self._parallelism or tasks)
        run = _Run(tuple(arguments), wanted, log, [_Task(index) for index in range(tasks)], tasks, places)
        places.acquire()
        # The first in this thread: if it cannot be started, nothing was.
        run.tasks[0].process = self._spawned(run, run.tasks[0])
        with self._lock:
            self._runs[name] = run
        for task in run.tasks:
            called = f"task-{name}-{task.index}"
            threading.Thread(target=self._attend, args=(name, run, task), name=called, daemon=True).start()
        return Execution(name, log.as_uri())

    def cancel(self, execution: str) -> None:
        with self._lock:
            run = self._runs.get(execution)
            if run is None or run.ended.is_set():
                return
            run.cancelled = True
            for process in run.processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)

    def wait(self, execution: str, timeout: float | None = None) -> int | None:
        """The exit code of an execution: 0, or that of its first task that ended otherwise.

        None when it has not ended or is not known here.
        """
        with self._lock:
            run = self._runs.get(execution)
        if run is None or not run.ended.wait(timeout):
            return None
        return next((task.exit_code for task in run.tasks if task.exit_code), 0)

    def exit_codes(self, execution: str) -> list[int | None]:
        """Of each task, the code it ended with for good; None where it has not.

        Raises:
            KeyError: No such execution was started here.
        """
        with self._lock:
            return [task.exit_code for task in self._runs[execution].tasks]

    def is_busy(self, job_id: str) -> bool:
        """Whether an execution of this job, started here, has not ended."""
        with self._lock:
            return any(run.arguments == (job_id,) and not run.ended.is_set() for run in self._runs.values())

    def close(self) -> None:
        """Stop retrying; what runs goes on, since a dispatcher that ends must not end the work."""
        self._closed.set()

    def end(self, *, grace: float) -> None:
        """Stop retrying, stop what runs, and wait for it.

        Args:
            grace: Seconds between SIGTERM and SIGKILL.
        """
        self.close()
        with self._lock:
            runs = dict(self._runs)
        for name in runs:
            self.cancel(name)
        deadline = time.monotonic() + grace
        for run in runs.values():
            if not run.ended.wait(max(deadline - time.monotonic(), 0)):
                with self._lock:
                    for process in run.processes:
                        process.kill()
                run.ended.wait()

    def _spawned(self, run: _Run, task: _Task) -> subprocess.Popen[bytes]:
        inherited = os.environ if self._inherits else {}
        own = {"CLOUD_RUN_TASK_INDEX": str(task.index), "CLOUD_RUN_TASK_ATTEMPT": str(task.attempt)}
        try:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            with run.log.open("ab") as output:
                return subprocess.Popen(
                    [*self._program, *run.arguments],
                    env={**inherited, **run.environment, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise Unavailable(f"the exporter could not be started: {error}") from error

    def _attend(self, name: str, run: _Run, task: _Task) -> None:
        """Start a task when there is a place for it, and again until it ends for good."""
        if task.process is None:
            run.places.acquire()
            self._started(name, run, task)
        code = NOT_STARTED
        while task.process is not None:
            code = task.process.wait()
            logger.info("execution %s, task %d, attempt %d: ended with %d", name, task.index, task.attempt, code)
            final = code in self._final_codes or task.attempt >= self._max_retries
            if final or run.cancelled or self._closed.wait(self._retry_delay * 2**task.attempt):
                break
            task.attempt += 1
            if not self._started(name, run, task):
                break
        run.places.release()
        with self._lock:
            task.exit_code = code
            run.unfinished -= 1
            if run.unfinished == 0:
                run.ended.set()

    def _started(self, name: str, run: _Run, task: _Task) -> bool:
        """Whether the task was started, now or again."""
        with self._lock:  # a cancel must see either the old process or the new one
            if run.cancelled or self._closed.is_set():
                return False
            try:
                task.process = self._spawned(run, task)
            except Unavailable as error:
                logger.warning("task %d of execution %s was not started: %s", task.index, name, error)
                return False
        return True


def open_runner(url: str, *, log_dir: Path, environment: Mapping[str, str]) -> JobRunner:
    """The runner that a URL selects: `process:` or `run://project/region/job`.

    Raises:
        Misconfigured: It selects none; the message says what is expected.
    """
    if url == "process:":
        return ProcessRunner(log_dir, environment)
    if url.startswith("run://"):
        from dispatcher.cloud_run import CloudRunRunner

        return CloudRunRunner.from_url(url)
    raise Misconfigured(f"runner {url!r}: expected process: or run://project/region/job")
