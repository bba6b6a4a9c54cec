"""A runner whose executions are threads of this process, tried again as Cloud Run tries a task again."""

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
    task: int
    attempt: int
    code: ExitCode


class ThreadRunner:
    """Runs `exporter.job.run_job` as `python -m exporter` does.

    Args:
        stores: Given the name of one attempt of a task, what it works with.

    Attributes:
        asked: Executions that were asked for, by name: their environment.
        ended: Every attempt that has ended.
        faults: What ended an attempt that is no error of ours.
    """

    def __init__(self, stores: Callable[[str], Stores]) -> None:
        self.asked: dict[str, dict[str, str]] = {}
        self.ended: list[Ended] = []
        self.faults: list[str] = []
        self._stores = stores
        self._numbers = itertools.count(1)
        self._stops: dict[str, Stop] = {}
        self._busy = 0
        self._changed = threading.Condition()

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        with self._changed:
            name = f"execution-{next(self._numbers)}"
            self.asked[name] = dict(environment)
            self._stops[name] = Stop()
            self._busy += tasks
        for index in range(tasks):
            order = Order(
                job_id=job_id,
                execution=name,
                export_id=environment["EXPORT_ID"],
                lease_id=environment["LEASE_ID"],
                task_index=index,
                task_count=tasks,
            )
            threading.Thread(target=self._attend, args=(order,), name=f"{name}/{index}", daemon=True).start()
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

    def _attend(self, order: Order) -> None:
        stop = self._stops[order.execution]
        try:
            for attempt in range(MAX_RETRIES + 1):
                code = self._run(replace(order, task_attempt=attempt), stop)
                self.ended.append(Ended(order.execution, order.task_index, attempt, code))
                if code is ExitCode.DONE or stop.is_set():
                    break
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _run(self, order: Order, stop: Stop) -> ExitCode:
        name = f"{order.execution}/{order.task_index}/{order.task_attempt}"
        try:
            return run_job(order, self._stores(name), stop)
        except ExportError as error:
            return ExitCode.TRY_AGAIN if error.retryable else ExitCode.FAILED
        except Exception as error:  # noqa: BLE001  # an entry point: it is what this is about
            self.faults.append(f"{name}: {type(error).__name__}: {error}")
            return ExitCode.TRY_AGAIN
