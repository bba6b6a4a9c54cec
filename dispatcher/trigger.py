"""Turns a message into one execution, and puts right what died on the way."""

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from dispatcher import lifecycle
from dispatcher.contract import UNFINISHED, ExportRecord, Failure, JobMessage, Lease, State
from dispatcher.errors import ExportError, LaunchInDoubt, SourceError, SweepIncomplete, Unavailable
from dispatcher.jobqueue import JobQueue
from dispatcher.lifecycle import Actor, transition
from dispatcher.logs import bound, traceparent_of
from dispatcher.messages import LAUNCHING, read_message, refusals_logged
from dispatcher.records import RecordStore, every_export, update
from dispatcher.runner import JobRunner
from dispatcher.tasks import task_count
from dispatcher.watched import Backlog, export_failed

logger = logging.getLogger(__name__)

REPUBLISH_AFTER = timedelta(minutes=5)
SETTLING = timedelta(minutes=1)
"""Within which whoever queued an export publishes it, withdraws it, or is started again to go on with it."""
OUTAGE = 10
"""Exports in a row that a sweep cannot tend, each perhaps after seconds, until it takes the queue for gone."""
RACES = 50
"""How often a compare-and-set may be lost to others before we say so."""


class Trigger:
    """Publishes, takes the short lease, starts the runner; every change of a record is one compare-and-set.

    Args:
        lease_seconds: How long a launch may take before another delivery may try.
        launch_grace_seconds: How long a launched execution may wait for a machine beyond that.
        several_tasks: Whether a large base is worth several tasks; on one machine they would gain nothing.
        clock: The time now, in UTC.
    """

    def __init__(
        self,
        *,
        records: RecordStore,
        queue: JobQueue,
        runner: JobRunner,
        lease_seconds: int = 120,
        max_attempts: int,
        launch_grace_seconds: int = 0,
        several_tasks: bool = True,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._records = records
        self._queue = queue
        self._runner = runner
        self._lease = timedelta(seconds=lease_seconds)
        self._max_attempts = max_attempts
        self._launch_grace = timedelta(seconds=launch_grace_seconds)
        self._several_tasks = several_tasks
        self._clock = clock

    def deliver(self, body: bytes, attributes: Mapping[str, str], *, message_id: str | None = None) -> None:
        """Take a message off the wire and `start` what it names; one that cannot be read is acknowledged.

        Raises:
            ExportError: Deliver it again.
        """
        message = read_message(body, message_id)
        if message is not None:
            with bound(job_id=message.job_id, export_id=message.export_id), refusals_logged():
                self.start(message, traceparent=traceparent_of(attributes.get("traceparent")))

    def deliver_dead(self, body: bytes, *, message_id: str | None = None) -> None:
        """Take a dead letter off the wire and `give_up` what it names; one that cannot be read is acknowledged.

        Raises:
            ExportError: Deliver it again.
        """
        message = read_message(body, message_id)
        if message is not None:
            with bound(job_id=message.job_id, export_id=message.export_id), refusals_logged():
                try:
                    self.give_up(message)
                except ExportError as error:
                    if error.retryable:
                        raise
                    # No delivery will ever do better, and a dead letter has no dead letters of its own.
                    logger.error("a dead letter was dropped: %s (%s)", error.message, error.error_code)

    def start(self, message: JobMessage, *, traceparent: str | None = None) -> None:
        """Start the execution that a message asks for, once, however often it is delivered.

        Returning acknowledges: the export is finished for good, under way, or now has an execution.

        Raises:
            Unavailable: Deliver it again: someone is launching it (`launch_in_progress`), or a port failed.
        """
        for _ in range(RACES):
            record = self._records.get_export(message.export_id)
            if record is None:
                logger.error("a message names export %s, which does not exist", message.export_id)
                return
            moved = self._moved(record)
            if moved is None:
                logger.info("export %s is %s: nothing to start", record.export_id, record.state)
                return
            if not self._records.replace_export(record, moved):
                continue
            if moved.state is State.STARTING:
                self._launch(moved, traceparent)
                return
            if moved.state is State.FAILED:
                # Our own verdict just now; going on would replay it at once, and so launch for ever.
                _log_given_up(moved)
                return
        raise _contended(message)

    def give_up(self, message: JobMessage) -> None:
        """Fail the export whose message was delivered in vain too often.

        One that is under way or finished is left alone. One whose launch died is launched again: its message was
        refused as long as that launch's lease was good, which says nothing about the next.

        Raises:
            Unavailable: Deliver it again: a launch may still succeed (`launch_in_progress`), or a port failed.
        """
        why = "it could not be started, however often that was tried; the dispatcher's log says why. Ask again"
        error = Failure(code="could_not_start", message=why, retryable=True)
        for _ in range(RACES):
            record, now = self._records.get_export(message.export_id), self._clock()
            if record is None:
                logger.error("a dead letter names export %s, which does not exist", message.export_id)
                return
            if record.state not in (State.QUEUED, State.STARTING) or record.execution is not None:
                logger.info("export %s is %s: its dead letter says nothing new", record.export_id, record.state)
                return
            if record.state is State.QUEUED and record.published_at is None:
                self.publish(record)
                return
            if lifecycle.holds_live_lease(record, now):
                raise _launching(record)
            new = self.reclaimed(record) or lifecycle.failed(record, by=Actor.DEAD_LETTER, error=error, now=now)
            if self._records.replace_export(record, new) and new.state is State.FAILED:
                _log_given_up(new)
                return
        raise _contended(message)

    def sweep(self, *, lost_messages: bool = False) -> dict[str, int]:
        """Put right what died: requeue or fail dead leases, publish again what waits for too long.

        An export that cannot be tended does not keep the others from it.

        Args:
            lost_messages: The queue forgot all it held, as the in-process one does when its process ends:
                publish everything that waits, however recent.

        Raises:
            SweepIncomplete: Some did not get through; after several in a row, the rest was not tried.
            Unavailable: The record store tells no exports.
        """
        done = {"requeued": 0, "failed": 0, "published": 0}
        missed, in_a_row, backlog = list[str](), 0, Backlog()
        for record in every_export(self._records, UNFINISHED):
            backlog.saw(record, self._clock())
            try:
                for name in self._tended(record, lost_messages=lost_messages):
                    done[name] += 1
                    in_a_row = 0
            except ExportError as error:
                logger.warning("export %s is left to the next sweep: %s", record.export_id, error.message)
                missed.append(f"{record.export_id}: {error.message}")
                in_a_row += 1
            if in_a_row == OUTAGE:
                break
        logger.info("%d exports are unfinished", backlog.unfinished, extra=backlog.fields())
        if missed:
            raise SweepIncomplete(missed, done)
        return done

    def nudge(self, export_id: str) -> None:
        """`sweep(lost_messages=True)` for one export."""
        record = self._records.get_export(export_id)
        if record is not None and record.state in UNFINISHED:
            list(self._tended(record, lost_messages=True))

    def publish(self, record: ExportRecord, traceparent: str | None = None) -> ExportRecord:
        """Send the export's message and note when; the record as it is then.

        Raises:
            Unavailable: The queue did not take it. The record is still there: asking again publishes it.
        """
        message = JobMessage(job_id=record.job_id, export_id=record.export_id)
        attributes = {
            "job_id": record.job_id,
            "export_id": record.export_id,
            "export_type": record.export_type.value,
        }
        self._queue.publish(message, attributes | ({"traceparent": traceparent} if traceparent else {}))

        def dated(current: ExportRecord) -> ExportRecord | None:
            now = self._clock()
            if current.state is not State.QUEUED:
                return None
            return lifecycle.noted(current, now, published_at=now, publications=current.publications + 1)

        return update(self._records, record.export_id, dated)

    def reclaimed(self, record: ExportRecord) -> ExportRecord | None:
        """`lifecycle.reclaimed`, by this deployment's limits."""
        return lifecycle.reclaimed(
            record, now=self._clock(), max_attempts=self._max_attempts, launch_grace=self._launch_grace
        )

    def is_overdue(self, record: ExportRecord) -> bool:
        """Whether a queued record's message was never sent, or so long ago that it may be lost."""
        return record.published_at is None or record.published_at + REPUBLISH_AFTER <= self._clock()

    def _is_settled(self, record: ExportRecord) -> bool:
        """Whether nobody is about to do it: one that was never published may be withdrawn, or its task tried again."""
        return record.published_at is not None or record.updated_at + SETTLING <= self._clock()

    def _moved(self, record: ExportRecord) -> ExportRecord | None:
        """The next move of a record towards an execution; None when none is called for."""
        now = self._clock()
        if record.state is State.FAILED and record.error and record.error.retryable:
            return transition(record, State.QUEUED, by=Actor.REPLAY, now=now)
        if record.state not in UNFINISHED:
            return None
        if (back := self.reclaimed(record)) is not None:
            return back
        if record.state is State.RUNNING or record.execution is not None:
            return None
        if record.state is State.STARTING:
            # Not acknowledged: if that launch died, the next delivery after its lease tries again.
            raise _launching(record)
        lease_id = uuid.uuid4().hex
        # The owner is this one delivery: two deliveries with one owner would both take the lease for theirs.
        lease = Lease(lease_id=lease_id, owner=f"trigger:{lease_id}", expires_at=now + self._lease)
        return transition(record, State.STARTING, by=Actor.TRIGGER, now=now, lease=lease)

    def _launch(self, record: ExportRecord, traceparent: str | None) -> None:
        lease_id = record.lease.lease_id if record.lease else ""
        environment = {"EXPORT_ID": record.export_id, "LEASE_ID": lease_id}
        if traceparent:
            environment["TRACEPARENT"] = traceparent

        def is_ours(current: ExportRecord) -> bool:
            held = current.lease.lease_id if current.lease else None
            return current.state is State.STARTING and held == lease_id

        def given_back(current: ExportRecord) -> ExportRecord | None:
            if not is_ours(current):
                return None
            return transition(current, State.QUEUED, by=Actor.TRIGGER, holding=lease_id, now=self._clock())

        try:
            execution = self._runner.start(record.job_id, environment, tasks=self._tasks(record.job_id))
        except LaunchInDoubt:
            raise  # It may be at work: the lease keeps others from starting a second one beside it.
        except ExportError:
            update(self._records, record.export_id, given_back)
            raise

        def launched(current: ExportRecord) -> ExportRecord | None:
            # An exporter that claimed it first knows its own name, but not where its log lies.
            if not is_ours(current) and current.execution != execution.name:
                return None
            return lifecycle.noted(current, self._clock(), execution=execution.name, log_uri=execution.log_uri)

        update(self._records, record.export_id, launched)
        logger.info("an execution was started", extra={"execution": execution.name})

    def _tasks(self, job_id: str) -> int:
        if not self._several_tasks:
            return 1
        try:
            return task_count(self._records.get_job(job_id))
        except SourceError:
            return 1  # enough for the execution to say what is wrong with the document

    def _tended(self, record: ExportRecord, *, lost_messages: bool) -> Iterator[str]:
        """Does what an unfinished record needs, and says each thing when it is done; see `sweep`."""
        overdue = record.state is State.QUEUED and self.is_overdue(record) and self._is_settled(record)
        back = self.reclaimed(record)
        if back is None and overdue and not lost_messages:
            back = lifecycle.undelivered(record, now=self._clock())
        if back is not None:
            if not self._records.replace_export(record, back):
                return
            if back.state is State.FAILED:
                _log_given_up(back)
                yield "failed"
                return
            yield "requeued"
            self.publish(back)
            yield "published"
            return
        waits = record.state is State.QUEUED or (record.state is State.STARTING and record.execution is None)
        if overdue or (waits and lost_messages):
            self.publish(record)
            yield "published"


def _log_given_up(record: ExportRecord) -> None:
    error = record.error
    fields = export_failed(error.code, retryable=error.retryable) if error else {}
    logger.error("export %s was given up: %s", record.export_id, error and error.message, extra=fields)


def _launching(record: ExportRecord) -> Unavailable:
    return Unavailable(f"export {record.export_id} is being launched", code=LAUNCHING)


def _contended(message: JobMessage) -> Unavailable:
    return Unavailable(f"export {message.export_id} keeps changing under us: deliver again")
