"""A runner whose executions are threads of this process, tried again as Cloud Run tries a task again."""

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dispatcher.errors import ExportError
from dispatcher.runner import Execution
from exporter.job import ExitCode, Stores, run_job
from exporter.order import Order
from exporter.stopping import Stop

MAX_RETRIES = 3


@dataclass(frozen=True)
class Ended:
    """How one attempt of a task ended."""

    execution: str
    attempt: int
    code: ExitCode


class ThreadRunner:
    """Runs `exporter.job.run_job` as `python -m exporter` does.

    Args:
        stores: Of an attempt, by execution and number: what it works with.

    Attributes:
        asked: Executions that were asked for, by name: their environment.
        ended: Every attempt that has ended.
        faults: What ended an attempt that is no error of ours.
    """

    def __init__(self, stores: Callable[[str, int], Stores]) -> None:
        self.asked: dict[str, dict[str, str]] = {}
        self.ended: list[Ended] = []
        self.faults: list[str] = []
        self._stores = stores
        self._numbers = itertools.count(1)
        self._stops: dict[str, Stop] = {}
        self._busy = 0
        self._changed = threading.Condition()

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        if tasks != 1:
            raise ValueError(f"{tasks} tasks: expected one, these are tiny models")
        with self._changed:
            name = f"execution-{next(self._numbers)}"
            self.asked[name] = dict(environment)
            self._stops[name] = Stop()
            self._busy += 1
        threading.Thread(target=self._attend, args=(name, job_id), name=name, daemon=True).start()
        return Execution(name, f"file:///logs/{name}.log")

    def cancel(self, execution: str) -> None:
        if execution in self._stops:
            self._stops[execution].set()

    def close(self) -> None:
        """Nothing: what runs ends by itself."""

    def idle(self, timeout: float) -> bool:
        """Wait until nothing runs; whether that came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._busy == 0, timeout)

    def _attend(self, name: str, job_id: str) -> None:
        try:
            for attempt in range(MAX_RETRIES + 1):
                code = self._run(name, job_id, attempt)
                self.ended.append(Ended(name, attempt, code))
                if code is ExitCode.DONE or self._stops[name].is_set():
                    break
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _run(self, name: str, job_id: str, attempt: int) -> ExitCode:
        given = self.asked[name]
        order = Order(
            job_id=job_id,
            execution=name,
            export_id=given["EXPORT_ID"],
            lease_id=given["LEASE_ID"],
            task_attempt=attempt,
        )
        try:
            return run_job(order, self._stores(name, attempt), self._stops[name])
        except ExportError as error:
            return ExitCode.TRY_AGAIN if error.retryable else ExitCode.FAILED
        except Exception as error:  # noqa: BLE001  # an entry point: it is what this is about
            self.faults.append(f"{name}, attempt {attempt}: {type(error).__name__}: {error}")
            return ExitCode.TRY_AGAIN
