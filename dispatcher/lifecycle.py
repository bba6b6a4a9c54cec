"""How an export may change: one table of moves, one pure function, and a few named shorthands.

Whoever stores the result does so by compare-and-set on `revision`, so two contenders that both computed a
legal move still cannot both make it.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from dispatcher.contract import (
    DEFAULT_QUANTIZATION,
    UNFINISHED,
    Artifact,
    ExportRecord,
    ExportRequest,
    ExportType,
    Failure,
    Lease,
    State,
)
from dispatcher.errors import IllegalTransition, LeaseHeld, LeaseLost

Q, S, R = State.QUEUED, State.STARTING, State.RUNNING
DONE, FAILED, CANCELLED = State.COMPLETED, State.FAILED, State.CANCELLED
LAUNCH_GRACE_SECONDS = 900
"""How long a task on Cloud Run may wait for a GPU, or for a place under a quota, before it counts as lost."""
MAX_PUBLICATIONS = 12
"""Messages of one export that may go out with none delivered; at one every five minutes, that is an hour."""


class Actor(StrEnum):
    """Who moves a record."""

    CALLER = "caller"
    OPERATOR = "operator"
    TRIGGER = "trigger"
    EXPORTER = "exporter"
    SWEEP = "sweep"
    DEAD_LETTER = "fail_export"
    REPLAY = "replay"


_ASKERS = frozenset({Actor.CALLER, Actor.OPERATOR})
MOVES: dict[tuple[State, State], frozenset[Actor]] = {
    (Q, S): frozenset({Actor.TRIGGER}),
    (S, S): frozenset({Actor.TRIGGER}),
    (S, Q): frozenset({Actor.TRIGGER, Actor.SWEEP}),
    (Q, R): frozenset({Actor.EXPORTER}),
    (S, R): frozenset({Actor.EXPORTER}),
    (R, R): frozenset({Actor.EXPORTER}),
    (R, Q): frozenset({Actor.EXPORTER, Actor.SWEEP}),
    (R, DONE): frozenset({Actor.EXPORTER}),
    (R, FAILED): frozenset({Actor.EXPORTER, Actor.SWEEP}),
    (Q, FAILED): frozenset({Actor.DEAD_LETTER, Actor.SWEEP}),
    (S, FAILED): frozenset({Actor.DEAD_LETTER, Actor.SWEEP}),
    (Q, CANCELLED): _ASKERS,
    (S, CANCELLED): _ASKERS,
    (R, CANCELLED): _ASKERS,
    (FAILED, Q): _ASKERS | {Actor.REPLAY},
    (CANCELLED, Q): _ASKERS,
    (DONE, Q): _ASKERS,
}
"""Every legal move and who may make it. `(S, S)` and `(R, R)` are take-overs of a lease."""


def holds_live_lease(record: ExportRecord, now: datetime) -> bool:
    """Whether anyone's lease on this export is still good at `now`."""
    return record.lease is not None and record.lease.expires_at > now


def transition(
    record: ExportRecord,
    to: State,
    *,
    by: Actor,
    now: datetime,
    holding: str | None = None,
    lease: Lease | None = None,
    **changes: Any,
) -> ExportRecord:
    """The record after a move, one revision later.

    Args:
        record: The record as read from the store.
        to: The state to move to.
        by: Who moves it.
        now: The mover's clock (UTC).
        holding: The lease id the mover was given; needed to leave a leased state as its holder.
        lease: The lease to take, when moving to `starting` or `running`.
        changes: Further fields, set last.

    Raises:
        IllegalTransition: The table does not have this move for this actor.
        LeaseHeld: Someone else's lease on it is live.
        LeaseLost: The mover's lease is not the record's any more.
    """
    name = f"export {record.export_id}"
    if by not in MOVES.get((record.state, to), frozenset()):
        raise IllegalTransition(f"{name} is {record.state}: {by} cannot move it to {to}")
    if by is Actor.REPLAY and not (record.error and record.error.retryable):
        raise IllegalTransition(f"{name} failed for good: a replay does not run it again, a new POST does")
    held = record.lease.lease_id if record.lease else None
    live = holds_live_lease(record, now)
    if to in (S, R):
        if lease is None:
            raise IllegalTransition(f"{name}: nothing moves to {to} without a lease")
        ours = record.lease is not None and (held == holding or record.lease.owner == lease.owner)
        if live and not ours:
            raise LeaseHeld(f"{name} is {record.state} under someone else's lease: nothing to do here")
    elif by is Actor.EXPORTER or (by is Actor.TRIGGER and record.state is S):
        if held is None or held != holding:
            raise LeaseLost(f"{name} is no longer held by lease {holding}: stop without writing")
    elif by in (Actor.SWEEP, Actor.DEAD_LETTER) and (live or (by is Actor.DEAD_LETTER and record.execution)):
        raise LeaseHeld(f"{name} is {record.state} and being worked on: left alone")
    ended = now if to in (DONE, FAILED, CANCELLED) else None
    effects = {**_effects(record, to, by), "lease": lease, "uncollected_since": ended, **changes}
    if to is Q and record.state is not S:  # what could not be started has waited all the while
        effects["queued_at"] = now
    return changed(record, now, state=to, **effects)


def _effects(record: ExportRecord, to: State, by: Actor) -> dict[str, Any]:
    """What a move does to the fields besides the lease."""
    if to is Q:
        anew: dict[str, Any] = {"stage": None, "progress": 0.0, "execution": None, "log_uri": None, "version": None}
        if by is not Actor.TRIGGER:  # whose message is not acknowledged, and so comes again
            anew["published_at"] = None
        if record.state not in (S, R):
            anew |= {"error": None, "artifacts": (), "summary": {}, "attempt": 0, "launches": 0, "publications": 0}
        elif record.state is S and by is Actor.TRIGGER:
            anew["launches"] = max(record.launches - 1, 0)  # the runner refused: nothing was started
        return anew
    if to is R:
        claimed = {"attempt": record.attempt + 1, "launches": 0, "publications": 0}
        return claimed | {"stage": "claimed", "progress": 0.0, "error": None, "version": None}
    if to is S:
        return {"execution": None, "log_uri": None, "launches": record.launches + 1, "publications": 0}
    if to is DONE:
        return {"stage": None, "progress": 1.0, "error": None}
    return {"stage": None}


def requested(
    request: ExportRequest, *, user_id: str, adapter_fingerprint: str, token_ref: str | None, now: datetime
) -> ExportRecord:
    """The first record of an export that nobody asked for before: queued, not yet published."""
    return ExportRecord(
        export_id=request.export_id,
        job_id=request.job_id,
        user_id=user_id,
        export_type=request.export_type,
        quantization=request.quantization or (DEFAULT_QUANTIZATION if request.export_type is ExportType.GGUF else None),
        state=Q,
        adapter_fingerprint=adapter_fingerprint,
        token_ref=token_ref,
        created_at=now,
        updated_at=now,
        queued_at=now,
    )


def delivered(record: ExportRecord, *, adapter: Artifact, adapter_fingerprint: str, now: datetime) -> ExportRecord:
    """An adapter's record: finished with the request itself, since the adapter is served as it lies.

    Raises:
        IllegalTransition: The export is of another type, which takes an exporter to complete.
    """
    if record.export_type is not ExportType.ADAPTER:
        raise IllegalTransition(f"export {record.export_id} is no adapter: only its exporter can complete it")
    done: dict[str, Any] = {"state": DONE, "stage": None, "progress": 1.0, "lease": None, "error": None}
    done |= {"artifacts": (adapter,), "adapter_fingerprint": adapter_fingerprint, "token_ref": None}
    return changed(record, now, **done)


def renewed(
    record: ExportRecord, *, holding: str, expires_at: datetime, stage: str, progress: float, now: datetime
) -> ExportRecord:
    """The exporter's heartbeat: the same lease, longer, with how far the work is.

    Several tasks may hold one lease: under it, stage and progress are those of the furthest, and never go back.

    Raises:
        LeaseLost: The export was cancelled, or its lease taken over.
    """
    lease = held(record, holding).model_copy(update={"expires_at": expires_at})
    further = {"stage": stage, "progress": min(progress, 1.0)} if progress >= record.progress else {}
    return changed(record, now, lease=lease, **further)


def completed(
    record: ExportRecord, *, holding: str, artifacts: tuple[Artifact, ...], now: datetime, **changes: Any
) -> ExportRecord:
    """The commit: the manifest is there, and the record says so."""
    return transition(record, DONE, by=Actor.EXPORTER, holding=holding, now=now, artifacts=artifacts, **changes)


def failed(
    record: ExportRecord, *, by: Actor, error: Failure, now: datetime, holding: str | None = None
) -> ExportRecord:
    """The verdict. The record still says where the token is: whoever deletes it, then takes that out."""
    return transition(record, FAILED, by=by, holding=holding, now=now, error=error)


def needs_token(record: ExportRecord) -> bool:
    """Whether an export, or a retry of it, may still ask for the token that its record refers to."""
    retried = record.state is FAILED and record.error is not None and record.error.retryable
    return retried or record.state in UNFINISHED


def reclaimed(
    record: ExportRecord, *, now: datetime, max_attempts: int, launch_grace: timedelta = timedelta(0)
) -> ExportRecord | None:
    """The record taken back from a holder that died; None when there is nothing to take back.

    An execution that was started but has not claimed yet may still wait for its machine: it gets
    `launch_grace` beyond the lease. A launch that never claims counts towards `max_attempts` too, or an image
    that cannot even start would be launched for ever.
    """
    if record.state not in (S, R) or record.lease is None or holds_live_lease(record, now):
        return None
    if record.state is S and record.execution and record.lease.expires_at + launch_grace > now:
        return None
    if record.state is R and record.attempt >= max_attempts:
        message = f"{record.attempt} attempts ended without a verdict; ask again to start over"
        error = Failure(code="attempts_exhausted", message=message, retryable=True)
        return failed(record, by=Actor.SWEEP, error=error, now=now)
    if record.state is S and record.launches >= max_attempts:
        message = (
            f"{record.launches} executions in a row ended before they began to work; "
            "see the execution's own log, then ask again to start over"
        )
        error = Failure(code="could_not_start", message=message, retryable=True)
        return failed(record, by=Actor.SWEEP, error=error, now=now)
    return transition(record, Q, by=Actor.SWEEP, now=now)


def undelivered(record: ExportRecord, *, now: datetime) -> ExportRecord | None:
    """The record given up because none of its messages was ever delivered; None while another may be sent.

    A message that is delivered after all runs it again, as it does any failure that a retry can mend.
    """
    if record.state is not Q or record.publications < MAX_PUBLICATIONS:
        return None
    message = (
        f"{record.publications} messages were sent and none was delivered: does the queue's subscription exist, and "
        "may it call start_export? Then ask again"
    )
    error = Failure(code="not_delivered", message=message, retryable=True)
    return failed(record, by=Actor.SWEEP, error=error, now=now)


def collected(record: ExportRecord) -> ExportRecord:
    """The record of an export of which nothing is left to collect; `updated_at` still says when it ended."""
    return changed(record, record.updated_at, uncollected_since=None)


def withdrawn(record: ExportRecord, *, before: ExportRecord | None, now: datetime) -> ExportRecord:
    """A request taken back that was written and never published: one too many for its user.

    The export is again what it was `before`, or cancelled where it was not there. A token that came with the request
    stays only where an earlier failure may still be tried again.

    Raises:
        IllegalTransition: Something has come of it already.
    """
    if record.state is not Q or record.published_at is not None or record.attempt or record.launches:
        raise IllegalTransition(f"export {record.export_id} is {record.state} and cannot be withdrawn: cancel it")
    if before is None:
        message = "too many exports of its user were unfinished when it was asked for; ask again"
        error = Failure(code="too_many_exports", message=message, retryable=True)
        return transition(record, CANCELLED, by=Actor.CALLER, now=now, error=error, token_ref=None)
    fields = {name: getattr(before, name) for name in ExportRecord.model_fields}
    # It may have kept another export's leftovers from being collected, which then counted on this one.
    fields["uncollected_since"] = before.uncollected_since or now
    return changed(record, now, **{**fields, "token_ref": (record if needs_token(before) else before).token_ref})


def noted(record: ExportRecord, now: datetime, **changes: Any) -> ExportRecord:
    """The record with a fact about it written down (`published_at`, `execution`, `log_uri`, `token_ref`)."""
    facts = {"published_at", "publications", "execution", "log_uri", "token_ref", "force_nonce"}
    unknown = changes.keys() - facts
    if unknown:
        raise IllegalTransition(f"{sorted(unknown)} are not facts to note; use a transition")
    return changed(record, now, **changes)


def held(record: ExportRecord, holding: str) -> Lease:
    """The lease under which a record is running, if it is this one.

    Raises:
        LeaseLost: The export has ended, or its lease was taken over.
    """
    if record.state is not R or record.lease is None or record.lease.lease_id != holding:
        raise LeaseLost(f"export {record.export_id} is {record.state} and no longer ours: stop before the next write")
    return record.lease


def changed(record: ExportRecord, now: datetime, **changes: Any) -> ExportRecord:
    """The record with other fields, one revision later; for this module and `dispatcher.shared_lease` alone."""
    fields = {name: getattr(record, name) for name in ExportRecord.model_fields}
    return ExportRecord.model_validate({**fields, **changes, "revision": record.revision + 1, "updated_at": now})
