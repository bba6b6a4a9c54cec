"""Holding an export while working on it: the claim, the heartbeat, and the moment to stop."""

import contextvars
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Protocol

from dispatcher.contract import ExportRecord, Lease, State
from dispatcher.errors import ExportError, IllegalTransition, LeaseLost, Unavailable
from dispatcher.lifecycle import LAUNCH_GRACE_SECONDS, Actor, holds_live_lease, renewed, transition
from dispatcher.records import RecordStore, update
from dispatcher.shared_lease import agreed, asked_anew, joined, left_to_others
from exporter.stopping import Stop

log = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
"""How often the record is read, so that a cancellation is seen."""
WRITE_SECONDS = 2.0
"""How often stage and progress are written at most, by all tasks together: Firestore takes about one write a second to
one document."""
SHUTTING_DOWN = "the machine is shutting down; the export goes back to the queue"


class Interrupted(ExportError):
    """The machine is going away (SIGTERM): the export goes back to the queue."""

    code = "interrupted"
    retryable = True


@dataclass(frozen=True)
class Term:
    """How long a lease lasts without a heartbeat."""

    seconds: int
    """After which its holder stops by itself"""
    clock_skew_seconds: int = 0
    """How much longer it is good in the record: others judge it by clocks of their own, and must not take it before its
    holder has noticed"""

    def end(self, now: datetime) -> datetime:
        """When a lease expires that is given, or extended, now."""
        return now + timedelta(seconds=self.seconds + self.clock_skew_seconds)


@dataclass(frozen=True)
class Claim:
    """A claimed export: its record as of then, and the lease that says it is ours."""

    record: ExportRecord
    lease_id: str
    term: Term
    tasks: int = 1
    """How many tasks of the execution may hold it together."""


def utc_now() -> datetime:
    """The clock of records and leases."""
    return datetime.now(UTC)


def claim(
    records: RecordStore, export_id: str, *, execution: str, handed: str | None, term: Term, tasks: int = 1
) -> Claim:
    """Take an export, or take it over where the rules allow that.

    The several tasks of one execution hold an export together: the first takes it, the others join its lease, which
    all of them therefore know by the same id.

    Args:
        records: The store.
        export_id: Which export.
        execution: Who takes it; the earlier attempt of an execution with one task is taken over at once.
        handed: The trigger's lease id, if it handed one.
        term: How long the lease is good without a heartbeat.
        tasks: How many tasks the execution has.

    Raises:
        LeaseHeld: Someone else is at work on it.
        IllegalTransition: Its state does not allow a claim; or it was asked for again since its tasks were launched:
            its own message starts another execution.
    """
    lease_id = secrets.token_hex(16)

    def change(record: ExportRecord) -> ExportRecord:
        now = utc_now()
        lease = Lease(lease_id=lease_id, owner=execution, expires_at=term.end(now))
        if tasks > 1 and record.state is State.RUNNING and record.lease and record.lease.owner == execution:
            return joined(record, execution=execution, expires_at=lease.expires_at, now=now)
        if tasks > 1 and handed and asked_anew(record, handed=handed):
            raise IllegalTransition(f"export {export_id} was asked for again: its message starts another execution")
        return transition(
            record,
            State.RUNNING,
            by=Actor.EXPORTER,
            now=now,
            holding=handed,
            lease=lease,
            execution=execution,
            # Where another execution's log lies would only mislead.
            log_uri=record.log_uri if record.execution == execution else None,
        )

    record = update(records, export_id, change)
    return Claim(record, record.lease.lease_id if record.lease else lease_id, term, tasks)


def leave(records: RecordStore, claimed: Claim) -> None:
    """Leave an export to tasks that are still to be started: they may wait for a machine longer than a lease lasts."""

    def change(record: ExportRecord) -> ExportRecord | None:
        now = utc_now()
        until = now + timedelta(seconds=LAUNCH_GRACE_SECONDS)
        return left_to_others(record, holding=claimed.lease_id, expires_at=until, now=now)

    try:
        update(records, claimed.record.export_id, change)
    except LeaseLost as error:
        log.info("it has ended meanwhile: %s", error.message)
    except ExportError as error:
        # At worst the sweep starts another execution, which goes on from what is finished.
        log.warning("the lease stays as it is: %s", error.message)


class Heartbeat:
    """Extends a lease from its own thread while the work goes on, and says when to stop.

    Args:
        records: The store.
        claimed: What to hold.
        stop: Says when the process is to stop, and gives the export back where the work cannot.
        release: Writes down that the export is not worked on any more.
    """

    def __init__(
        self, records: RecordStore, claimed: Claim, *, stop: Stop, release: Callable[[], object] = lambda: None
    ) -> None:
        self._records = records
        self._claim = claimed
        self._seconds = claimed.term.seconds
        self._stop = stop
        self._release = release
        self._clear: Callable[[], object] | None = None
        self._is_cancelled = False
        self._stage, self._progress = "claimed", 0.0
        self._error: ExportError | None = None
        self._written = time.monotonic()
        self._said = (self._stage, self._progress)
        self._wake = threading.Event()
        # The ids that log lines carry belong to the context, which a thread does not inherit.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="heartbeat", daemon=True
        )

    def __enter__(self) -> "Heartbeat":
        self._holding = self._stop.holding(self)
        self._holding.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wake.set()
        self._thread.join()
        self._holding.__exit__(kind, error, trace)

    def report(self, stage: str, progress: float) -> None:
        """Say how far the work is (0..1); written with the next beat.

        Raises:
            LeaseLost: The export was cancelled or taken over: stop before the next write.
            Interrupted: The machine is going away.
            Unavailable: No heartbeat gets through (`heartbeat_failed`).
        """
        self._stage, self._progress = stage, progress
        self.check()

    def check(self) -> None:
        """Raise what `report` would, where there is nothing to say."""
        if self._error is not None:
            if self._is_cancelled:
                self._stop.noticed(self)
            raise self._error
        if self._stop.is_set():
            raise Interrupted(SHUTTING_DOWN)
        if time.monotonic() > self._written + self._seconds:
            raise Unavailable(
                f"no heartbeat of {self._claim.record.export_id} got through for {self._seconds} s",
                code="heartbeat_failed",
            )

    def agree(self, version: str, *, instead_of: str | None = None) -> None:
        """Settle which version is made, among the tasks that hold the export together; one alone has nobody to ask.

        Args:
            version: What this task is about to make.
            instead_of: The version that this one is made in place of, if that one is spoilt.

        Raises:
            LeaseLost: The export was cancelled or taken over.
            Unavailable: Another task is making another version: base or adapter changed (`source_changed`).
        """
        if self._claim.tasks == 1:
            return

        def change(record: ExportRecord) -> ExportRecord | None:
            holding = self._claim.lease_id
            return agreed(record, holding=holding, version=version, instead_of=instead_of, now=utc_now())

        update(self._records, self._claim.record.export_id, change)

    def cleared_by(self, clear: Callable[[], object]) -> None:
        """Say what removes all that was written, should the export be cancelled while the work hangs."""
        self._clear = clear

    def clear(self) -> None:
        """Remove what was written, if the export was cancelled before it could be recorded."""
        try:
            if self._clear is not None and self.is_cancelled():
                self._clear()
        except ExportError as error:
            log.warning("what was written of %s stays: %s", self._claim.record.export_id, error.message)

    def give_back(self) -> None:
        """Remove what was written of a cancelled export; of any other, write down that it is not worked on any more.

        For whoever ends the process while the work goes on.
        """
        what = self._clear if self._is_cancelled else self._release
        try:
            if what is not None:
                what()
        except ExportError as error:
            log.warning("%s is not given back: %s", self._claim.record.export_id, error.message)

    def is_ours(self) -> bool:
        """Whether nobody else can be at work on it: the lease is ours and live, or it was cancelled under us.

        Asked before anything published is removed, by an attempt that may have been asleep for an hour. Of several
        tasks, each has to expect the others at work, until the export is cancelled for them all.
        """
        return self._stands(lambda record: self._is_cancelled_in(record) or self._is_alone_in(record))

    def is_cancelled(self) -> bool:
        """Whether the export was cancelled under us, and nobody has begun anew."""
        return self._stands(self._is_cancelled_in)

    def _stands(self, holds: Callable[[ExportRecord], bool]) -> bool:
        try:
            record = self._records.get_export(self._claim.record.export_id)
        except ExportError as error:
            log.warning("nothing is removed, the record cannot be read: %s", error)
            return False
        return record is None or holds(record)

    def _is_cancelled_in(self, record: ExportRecord) -> bool:
        # Else a claim came after ours, and its holder may not have noticed yet that it was cancelled too.
        mine = self._claim.record
        same = (record.execution, record.attempt) == (mine.execution, mine.attempt)
        return record.state is State.CANCELLED and same

    def _is_alone_in(self, record: ExportRecord) -> bool:
        ours = record.lease is not None and record.lease.lease_id == self._claim.lease_id
        return ours and self._claim.tasks == 1 and holds_live_lease(record, utc_now())

    def _run(self) -> None:
        while not self._wake.wait(min(BEAT_SECONDS, self._seconds / 4)):
            started, said = time.monotonic(), (self._stage, self._progress)
            due = self._is_due(started, said)
            try:
                update(self._records, self._claim.record.export_id, partial(self._beaten, said, due))
            except LeaseLost as error:
                self._error = error
                if self._is_cancelled:
                    self._stop.cancelled(self)
                return
            except Unavailable as error:
                log.warning("heartbeat did not get through: %s", error)
            except Exception as error:
                # A thread that died silently would let the lease run out under the work.
                log.exception("the heartbeat failed")
                self._error = Unavailable(f"the heartbeat failed: {error}", code="heartbeat_failed")
                return
            else:
                if due:
                    self._written, self._said = started, said

    def _is_due(self, now: float, said: tuple[str, float]) -> bool:
        """Whether the record is to be written: there is news, or a third of the lease has gone."""
        age = now - self._written
        return age >= self._seconds / 3 or (age >= WRITE_SECONDS * self._claim.tasks and said != self._said)

    def _beaten(self, said: tuple[str, float], due: bool, record: ExportRecord) -> ExportRecord | None:
        now = utc_now()
        lease_end = self._claim.term.end(now)
        stage, progress = said
        self._is_cancelled = record.state is State.CANCELLED
        # Made even when it is not due, since it is what notices that the lease is lost.
        new = renewed(
            record, holding=self._claim.lease_id, expires_at=lease_end, stage=stage, progress=progress, now=now
        )
        return new if due else None


Report = Callable[[str, float], None]
"""`Hold.report`: what the recipe tells about its stage and fraction, and where it is stopped."""


class Hold(Protocol):
    """What a recipe needs of the claim it works under; a `Heartbeat`."""

    def report(self, stage: str, progress: float) -> None: ...

    def check(self) -> None: ...

    def agree(self, version: str, *, instead_of: str | None = None) -> None: ...

    def cleared_by(self, clear: Callable[[], object]) -> None: ...

    def is_ours(self) -> bool: ...

    def is_cancelled(self) -> bool: ...
