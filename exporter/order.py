"""What an execution was asked to do, and which exports that comes to."""

from dataclasses import dataclass

from dispatcher.artifacts import ArtifactStore
from dispatcher.contract import UNFINISHED, ExportRecord, ExportRequest, ExportType, State, TrainingJob
from dispatcher.errors import JobNotCompleted, NotAvailable, NotFound
from dispatcher.lifecycle import Actor, noted, requested, transition
from dispatcher.records import RecordStore, update
from exporter.lease import utc_now
from exporter.tasks import Tasks


@dataclass(frozen=True)
class Order:
    """What an execution was asked to do, and which of its tasks this process is."""

    job_id: str
    execution: str
    engine: str = "auto"
    export_id: str | None = None
    """The trigger's export; None when an operator runs the job."""
    lease_id: str | None = None
    """The trigger's lease on it."""
    export_type: ExportType | None = None
    """An operator's wish for one that nobody may have requested."""
    quantization: str | None = None
    force_nonce: str | None = None
    """Set to make even a finished export anew."""
    task_index: int = 0
    task_count: int = 1
    task_attempt: int = 0
    """How often this task was started before."""

    @property
    def tasks(self) -> Tasks:
        """This task among those of the execution."""
        return Tasks(self.task_index, self.task_count)


def ordered(order: Order, records: RecordStore, artifacts: ArtifactStore, job: TrainingJob) -> list[ExportRecord]:
    """The exports to do, first the one that was asked for.

    Of several tasks that the trigger started, each does the one export alone: what else is queued may be more for
    those that begin later, and would then never get all of its tasks.

    Raises:
        NotFound: There is no such export (`export_not_found`).
        NotAvailable, JobNotCompleted: What an operator wishes cannot be made.
    """
    if order.export_type is not None:
        return [_wished(order, order.export_type, records, artifacts, job)]
    by_id = {record.export_id: record for record in records.list_exports(job_id=job.job_id)}
    if order.export_id is not None:
        if order.export_id not in by_id:
            raise NotFound(f"there is no export {order.export_id}.", code="export_not_found")
        first = [by_id.pop(order.export_id)]
        if order.task_count > 1:
            return first
        return first + [record for record in by_id.values() if record.state is State.QUEUED]
    wanted = UNFINISHED | {State.FAILED} | ({State.COMPLETED} if order.force_nonce else set())
    found = [
        record for record in by_id.values() if record.state in wanted and record.export_type is not ExportType.ADAPTER
    ]
    return [_requeued(record, order, records) for record in found]


def _wished(
    order: Order, kind: ExportType, records: RecordStore, artifacts: ArtifactStore, job: TrainingJob
) -> ExportRecord:
    """The export of a type that an operator asks for, recorded now if nobody had requested it."""
    if kind is ExportType.ADAPTER:
        raise NotAvailable(
            "an adapter is exported by POST /export alone: there is nothing to run.", code="nothing_to_run"
        )
    if job.status != State.COMPLETED:
        raise JobNotCompleted(f"training job {job.job_id} is {job.status!r}, not completed.")
    request = ExportRequest.model_validate(
        {"job_id": job.job_id, "export_type": kind, "quantization": order.quantization}
    )
    fingerprint = artifacts.fingerprint(job.adapter_path) if job.adapter_path else ""
    record = requested(request, user_id=job.user_id, adapter_fingerprint=fingerprint, token_ref=None, now=utc_now())
    records.create_export(record)
    return _requeued(record, order, records)


def _requeued(record: ExportRecord, order: Order, records: RecordStore) -> ExportRecord:
    """An operator's rerun: failed and cancelled exports are queued again, finished ones when forced."""

    def change(found: ExportRecord) -> ExportRecord | None:
        if found.state is State.QUEUED and order.force_nonce is not None:
            return noted(found, utc_now(), force_nonce=order.force_nonce)
        again = found.state in (State.FAILED, State.CANCELLED) or (
            found.state is State.COMPLETED and order.force_nonce is not None
        )
        if not again or found.execution == order.execution:
            return None
        return transition(
            found,
            State.QUEUED,
            by=Actor.OPERATOR,
            now=utc_now(),
            force_nonce=order.force_nonce or found.force_nonce,
        )

    return update(records, record.export_id, change)
