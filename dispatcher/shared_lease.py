"""How the several tasks of one execution hold an export together: one lease, one version, and what a task leaves.

Pure functions, as in `dispatcher.lifecycle`.
"""

from datetime import datetime

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import LeaseLost, Unavailable
from dispatcher.lifecycle import changed, held


def joined(record: ExportRecord, *, execution: str, expires_at: datetime, now: datetime) -> ExportRecord:
    """A further task of the execution that holds the export: the same lease, no shorter than it was.

    A lease of that execution which has run out is taken up again, since its tasks may run hours apart. It is one
    attempt, however many tasks join it; stage and progress stay.

    Raises:
        LeaseLost: The export is not running, or another execution holds it.
    """
    lease = record.lease
    if record.state is not State.RUNNING or lease is None or lease.owner != execution:
        raise LeaseLost(f"export {record.export_id} is {record.state} and not held by execution {execution}")
    return changed(record, now, lease=lease.model_copy(update={"expires_at": max(lease.expires_at, expires_at)}))


def agreed(
    record: ExportRecord, *, holding: str, version: str, instead_of: str | None, now: datetime
) -> ExportRecord | None:
    """The version that all tasks under one lease make, which the first of them says; None where it is said already.

    Args:
        record: The record as read from the store.
        holding: The lease of the task that asks.
        version: What it is about to make.
        instead_of: The version that this one is made in place of, because that one is spoilt.
        now: The task's clock (UTC).

    Raises:
        LeaseLost: The export has ended, or its lease was taken over.
        Unavailable: Another task is making another one: base or adapter changed (`source_changed`).
    """
    held(record, holding)
    if record.version == version:
        return None
    if record.version not in (None, instead_of):
        raise Unavailable(
            f"this task of export {record.export_id} would make version {version}, and another made a part of "
            f"{record.version}: the base model or the adapter changed between them. Nothing was published; ask again.",
            code="source_changed",
        )
    return changed(record, now, version=version)


def left_to_others(record: ExportRecord, *, holding: str, expires_at: datetime, now: datetime) -> ExportRecord | None:
    """The end of a task while it, or others of its execution, are still to be started: the lease lasts until then.

    None where it lasts as long already. The heartbeat of a task that is at work says anew how long, and may say less.

    Raises:
        LeaseLost: The export has ended, or its lease was taken over.
    """
    lease = held(record, holding)
    if lease.expires_at >= expires_at:
        return None
    return changed(record, now, lease=lease.model_copy(update={"expires_at": expires_at}))


def asked_anew(record: ExportRecord, *, handed: str) -> bool:
    """Whether an export that waits was asked for again since the trigger handed this lease to an execution.

    Its message then starts another. Until it is asked for again, the record counts the launch, or the claim after it;
    so where the sweep took it back, because the execution was late or came to a stop, whoever comes first goes on.
    """
    if record.state not in (State.QUEUED, State.STARTING) or (
        record.lease is not None and record.lease.lease_id == handed
    ):
        return False
    earlier_launches = record.launches - (record.state is State.STARTING)
    return record.attempt == 0 and earlier_launches == 0
