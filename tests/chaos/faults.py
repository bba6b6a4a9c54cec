"""Ports that fail at random around real ones: a call fails before it acts, acts and loses its answer, or acts twice."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

from dispatcher.contract import ExportRecord, JobMessage, State, TrainingJob
from dispatcher.errors import ExportError, LaunchInDoubt, Unavailable
from dispatcher.jobqueue import JobQueue
from dispatcher.records import RecordStore
from dispatcher.runner import Execution, JobRunner
from dispatcher.tokens import TokenStore
from tests.chaos.watch import Watch

T = TypeVar("T")


class Fate(Enum):
    """What becomes of a call."""

    FINE = auto()
    NOT_DONE = auto()
    """It raises its port's retryable error, and did nothing."""
    ANSWER_LOST = auto()
    """It is done, and raises all the same."""
    TWICE = auto()
    """It is done twice, as where the transport tries again after a lost answer; the second answer counts."""


FAULTS = (Fate.NOT_DONE, Fate.ANSWER_LOST, Fate.TWICE)


class Dice:
    """Decides each call's fate, by a seed: the n-th call of one name by one caller always has the same.

    Which calls there are depends on how threads come to turns, and so a seed's run is not quite the same each time.

    Args:
        seed: Of all that it decides.
        rate: How many of all calls fail, from 0 to 1.

    Attributes:
        calm: While it is set nothing fails.
        thrown: How many calls had each fate.
    """

    def __init__(self, seed: int, rate: float) -> None:
        self.calm = False
        self.thrown: Counter[Fate] = Counter()
        self._seed = seed
        self._rate = rate
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fate(self, caller: str, name: str, *, rarer: int = 1) -> Fate:
        """What becomes of the next call of a name; `rarer` by so much is how seldom it fails."""
        with self._lock:
            key = f"{caller} {name}"
            self._calls[key] += 1
            dice = random.Random(f"{self._seed} {key} {self._calls[key]}")
            fate = dice.choice(FAULTS) if not self.calm and dice.random() < self._rate / rarer else Fate.FINE
            self.thrown[fate] += 1
        return fate

    def call(
        self,
        caller: str,
        name: str,
        act: Callable[[], T],
        *,
        rarer: int = 1,
        once: bool = False,
        error: Callable[[str], ExportError] = Unavailable,
        lost: Callable[[str], ExportError] | None = None,
    ) -> T:
        """Make a call, whatever becomes of it.

        Args:
            caller: Who calls.
            name: What.
            act: The call.
            rarer: By how much it fails less often than others.
            once: Whether no transport could make it twice.
            error: The port's error for what was not done.
            lost: The port's error for what may have been done.

        Raises:
            ExportError: `error` or `lost`, or what `act` raises.
        """
        fate = self.fate(caller, name, rarer=rarer)
        if fate is Fate.NOT_DONE:
            raise error(f"{name} of {caller} did not get through, as the dice has it")
        if fate is Fate.ANSWER_LOST:
            with suppress(ExportError):  # that answer is lost too
                act()
            raise (lost or error)(f"the answer of {name} to {caller} was lost, as the dice has it")
        if fate is Fate.TWICE and not once:
            act()
        return act()


class FaultyRecords:
    """A record store that fails at random.

    Args:
        inner: The real one.
        dice: Decides when.
        caller: Whose it is.
        watch: Sees what is stored.
    """

    def __init__(self, inner: RecordStore, dice: Dice, caller: str, watch: Watch) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller
        self._watch = watch

    def get_job(self, job_id: str) -> TrainingJob | None:
        return self._call("get_job", lambda: self._inner.get_job(job_id))

    def put_job(self, job_id: str, document: dict[str, Any]) -> bool:
        return self._call("put_job", lambda: self._inner.put_job(job_id, document))

    def get_export(self, export_id: str) -> ExportRecord | None:
        return self._call("get_export", lambda: self._inner.get_export(export_id))

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        def act() -> bool:
            create = partial(self._inner.create_export, record, job_result=job_result)
            return self._watch.stored(None, record, self._caller, create)

        return self._call("create_export", act)

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        def act() -> bool:
            replace = partial(self._inner.replace_export, old, new, job_result=job_result)
            return self._watch.stored(old, new, self._caller, replace)

        return self._call("replace_export", act)

    def list_exports(
        self,
        *,
        user_id: str | None = None,
        job_id: str | None = None,
        states: Collection[State] | None = None,
        limit: int = 100,
        after: str | None = None,
        strict: bool = False,
    ) -> list[ExportRecord]:
        def act() -> list[ExportRecord]:
            return self._inner.list_exports(
                user_id=user_id, job_id=job_id, states=states, limit=limit, after=after, strict=strict
            )

        return self._call("list_exports", act)

    def list_uncollected(self, states: Collection[State], *, until: datetime, limit: int = 100) -> list[ExportRecord]:
        return self._call("list_uncollected", lambda: self._inner.list_uncollected(states, until=until, limit=limit))

    def close(self) -> None:
        """Nothing: the real one is not this one's to close."""

    def _call(self, name: str, act: Callable[[], T]) -> T:
        return self._dice.call(self._caller, name, act)


class FaultyQueue:
    """A queue that fails at random; arguments as of `FaultyRecords`."""

    def __init__(self, inner: JobQueue, dice: Dice, caller: str) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller

    def publish(self, message: JobMessage, attributes: Mapping[str, str]) -> None:
        self._dice.call(self._caller, "publish", lambda: self._inner.publish(message, attributes))

    def close(self) -> None:
        self._inner.close()


class FaultyRunner:
    """A runner that fails at random; arguments as of `FaultyRecords`."""

    def __init__(self, inner: JobRunner, dice: Dice, caller: str) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        def act() -> Execution:
            return self._inner.start(job_id, environment, tasks=tasks)

        return self._dice.call(self._caller, "start", act, lost=LaunchInDoubt)

    def cancel(self, execution: str) -> None:
        self._dice.call(self._caller, "cancel", lambda: self._inner.cancel(execution))

    def close(self) -> None:
        self._inner.close()


class FaultyTokens:
    """A token store that fails at random; arguments as of `FaultyRecords`."""

    def __init__(self, inner: TokenStore, dice: Dice, caller: str) -> None:
        self._inner = inner
        self._dice = dice
        self._caller = caller

    def put(self, export_id: str, token: str) -> str:
        return self._dice.call(self._caller, "put", lambda: self._inner.put(export_id, token))

    def get(self, ref: str) -> str:
        return self._dice.call(self._caller, "get", lambda: self._inner.get(ref))

    def delete(self, ref: str) -> None:
        self._dice.call(self._caller, "delete", lambda: self._inner.delete(ref))
