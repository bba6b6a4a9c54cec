"""What one execution does: find the exports of a job, claim each, make it, record how that went."""

import contextvars
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from dispatcher.artifacts import ArtifactStore
from dispatcher.contract import RESULT_FIELD, ExportRecord, ExportType, Failure, State, TrainingJob
from dispatcher.errors import ExportError, IllegalTransition, LeaseLost, NotFound, Unavailable
from dispatcher.lifecycle import Actor, completed, failed, transition
from dispatcher.logs import bound, clean
from dispatcher.records import RecordStore, update
from dispatcher.tokens import TokenStore
from dispatcher.watched import export_failed
from exporter.artifact import Result
from exporter.ending import drop_token, ending, fault_of, found_now, tidy
from exporter.gguf_export import export_gguf
from exporter.lease import SHUTTING_DOWN, Claim, Heartbeat, Interrupted, Term, claim, leave, utc_now
from exporter.making import Checks
from exporter.merged import export_merged
from exporter.order import Order, ordered
from exporter.shared_pass import Share, SharedPass
from exporter.stopping import TRY_AGAIN, Stop

log = logging.getLogger(__name__)
MAX_ERROR_CHARACTERS = 2000
MAX_INTERRUPTED = 20
"""Attempts of an export that may be interrupted by the platform: it may never find the time that it takes"""
DOCUMENT_FIELD = {ExportType.MERGED: "artifacts.raw.merged", ExportType.GGUF: "artifacts.file.gguf"}
"""Where the training job's document has a result besides `RESULT_FIELD`"""


class ExitCode(IntEnum):
    """What the platform learns from the process."""

    DONE = 0
    """Nothing is left for this execution to do."""
    FAILED = 1
    """Failed for good; the record says why."""
    TRY_AGAIN = TRY_AGAIN
    """A passing fault."""


@dataclass(frozen=True)
class Stores:
    """The ports an execution needs, and what bounds it."""

    records: RecordStore
    artifacts: ArtifactStore
    tokens: TokenStore
    term: Term
    """Of the leases it takes"""
    max_attempts: int
    checks: Checks = field(default_factory=Checks)
    base_cache: bool = True
    """Whether bases of the hub are kept in the bucket"""
    hf_token: str | None = None
    """The deployment's own Hugging Face token, used where the caller gave none."""


def run_job(order: Order, stores: Stores, stop: Stop) -> ExitCode:
    """Do every export that this order is about; one's failure does not keep the others from being made.

    Raises:
        ExportError: The order itself cannot be followed: no such job, no such export.
    """
    try:
        job = stores.records.get_job(order.job_id)
        if job is None:
            raise NotFound(f"there is no training job {order.job_id}.", code="job_not_found")
    except ExportError as error:
        if order.export_id is None or error.retryable:
            raise
        return _refuse(order, order.export_id, error, stores)
    if order.task_attempt:
        tidy(order.job_id, order.execution, stores.records, stores.tokens)
    worst = ExitCode.DONE
    for group in _groups(ordered(order, stores.records, stores.artifacts, job)):
        worst = max(worst, _run_group(group, order, stores, job, stop))
        if stop.is_set():
            return max(worst, ExitCode.TRY_AGAIN)
    return worst


def _groups(records: list[ExportRecord]) -> list[list[ExportRecord]]:
    """The exports in the order in which they are made; the quantizations of one model together."""
    ggufs = [record for record in records if record.export_type is ExportType.GGUF]
    groups: list[list[ExportRecord]] = []
    for record in records:
        if record.export_type is not ExportType.GGUF:
            groups.append([record])
        elif record is ggufs[0]:
            groups.append(ggufs)
    return groups


def _run_group(group: list[ExportRecord], order: Order, stores: Stores, job: TrainingJob, stop: Stop) -> ExitCode:
    """Run exports side by side that share their pass over the base; each is claimed, and fails, by itself."""
    shared = SharedPass(len(group), memory_budget=stores.checks.memory_budget)

    def run(record: ExportRecord) -> ExitCode:
        share = Share(shared)
        try:
            with bound(export_id=record.export_id):
                return _run_export(record, order, stores, job, stop, share)
        finally:
            share.leave()

    if len(group) == 1:
        return run(group[0])
    contexts = [contextvars.copy_context() for _ in group]
    with ThreadPoolExecutor(len(group), thread_name_prefix="export") as pool:
        running = [pool.submit(context.run, run, record) for context, record in zip(contexts, group, strict=True)]
        return max(future.result() for future in running)


def _refuse(order: Order, export_id: str, error: ExportError, stores: Stores) -> ExitCode:
    """Record why the trigger's export cannot even begin; unsaid, it would be launched again and again."""
    try:
        claimed = _claimed(order, export_id, stores)
    except IllegalTransition as held:
        log.info("left alone: %s", held.message)
        return ExitCode.DONE
    return _give_up(claimed, error, order, stores)


def _claimed(order: Order, export_id: str, stores: Stores) -> Claim:
    handed = order.lease_id if export_id == order.export_id else None
    return claim(
        stores.records,
        export_id,
        execution=order.execution,
        handed=handed,
        term=stores.term,
        tasks=order.task_count,
    )


def _run_export(
    record: ExportRecord,
    order: Order,
    stores: Stores,
    job: TrainingJob,
    stop: Stop,
    share: Share,
) -> ExitCode:
    if record.state is State.FAILED and record.execution == order.execution:
        log.error("this execution has failed before: %s", record.error.message if record.error else "")
        return ExitCode.FAILED
    try:
        claimed = _claimed(order, record.export_id, stores)
    except IllegalTransition as error:
        log.info("nothing to do: %s", error.message)
        return ExitCode.DONE
    log.info("claimed %s, attempt %d", record.export_id, claimed.record.attempt)
    release = partial(_give_up, claimed, Interrupted(SHUTTING_DOWN), order, stores)
    try:
        with Heartbeat(stores.records, claimed, stop=stop, release=release) as heartbeat:
            result = _make(claimed.record, order, stores, job, heartbeat, share)
        if result is None:
            leave(stores.records, claimed)
            log.info("part %d of %d is done, others are still at theirs", order.task_index + 1, order.task_count)
            return ExitCode.DONE
        try:
            _commit(claimed, result, stores)
        except LeaseLost:
            heartbeat.clear()
            raise
    except LeaseLost as error:
        log.warning("stopped: %s", error.message)
        return ExitCode.DONE
    except ExportError as error:
        return _give_up(claimed, error, order, stores)
    except BaseException as error:
        # The one broad catch: a fault of ours must end in the record, not only in a log.
        fault = fault_of(error)
        if fault is None:
            raise
        log.exception("unexpected fault")
        return _give_up(claimed, fault, order, stores)
    log.info("completed %s: %s", record.export_id, result.artifact.uri)
    return ExitCode.DONE


def _make(
    record: ExportRecord, order: Order, stores: Stores, job: TrainingJob, heartbeat: Heartbeat, share: Share
) -> Result | None:
    """The published artifact; None while other tasks are still at their parts of it."""

    def token() -> str | None:
        return stores.tokens.get(record.token_ref) if record.token_ref else stores.hf_token

    make = partial(export_gguf, share=share) if record.export_type is ExportType.GGUF else export_merged
    return make(
        stores.artifacts,
        job,
        record,
        engine=order.engine,
        token=token,
        hold=heartbeat,
        checks=stores.checks,
        tasks=order.tasks,
        base_cache=stores.base_cache,
    )


def _commit(claimed: Claim, result: Result, stores: Stores) -> None:
    """The compare-and-set that makes the export finished, and the result in the training job's document."""
    kind = claimed.record.export_type
    paths = {RESULT_FIELD[kind]: result.artifact.path, DOCUMENT_FIELD[kind]: result.artifact.path}

    token_ref = claimed.record.token_ref

    def change(record: ExportRecord) -> ExportRecord:
        nonlocal token_ref
        token_ref = record.token_ref or token_ref  # one that came since the claim too
        return completed(
            record,
            holding=claimed.lease_id,
            artifacts=(result.artifact,),
            now=utc_now(),
            adapter_fingerprint=result.adapter_fingerprint,
            summary=result.summary,
        )

    try:
        update(stores.records, claimed.record.export_id, change, job_result=paths)
    except IllegalTransition as error:
        if ending(claimed.record.export_id, stores.records) is not State.COMPLETED:
            raise LeaseLost(f"finished, but {error.message}") from error
        # By ourselves, and only the answer was lost; or by whoever took it over, with the same artifact.
    drop_token(claimed.record.export_id, token_ref, stores.records, stores.tokens)


def _give_up(claimed: Claim, error: ExportError, order: Order, stores: Stores) -> ExitCode:
    """Record why this attempt ended: back to the queue after a passing fault, else failed.

    After a passing fault of one of several tasks the others go on, and this one is started again.
    """
    record = claimed.record
    attempt = order.task_attempt + 1 if order.task_count > 1 else record.attempt
    most = MAX_INTERRUPTED if isinstance(error, Interrupted) else stores.max_attempts
    again = error.retryable and attempt < most
    if again and order.task_count > 1:
        if attempt < stores.max_attempts:
            leave(stores.records, claimed)
        log.error("%s: %s (%s)", record.export_id, error.message, error.error_code)
        return ExitCode.TRY_AGAIN

    token_ref = record.token_ref

    def change(found: ExportRecord) -> ExportRecord:
        nonlocal token_ref
        token_ref = found.token_ref or token_ref
        now = utc_now()
        if again:
            return transition(found, State.QUEUED, by=Actor.EXPORTER, now=now, holding=claimed.lease_id)
        failure = Failure(
            code=error.error_code,
            message=clean(error.message, limit=MAX_ERROR_CHARACTERS),
            retryable=error.retryable,
        )
        return failed(found, by=Actor.EXPORTER, error=failure, now=now, holding=claimed.lease_id)

    try:
        try:
            update(stores.records, record.export_id, change)
        finally:
            # After it, since a log that nobody reads holds up whoever writes to it, and may hold up the end.
            fields = {} if again else export_failed(error.error_code, retryable=error.retryable)
            log.error("%s: %s (%s)", record.export_id, error.message, error.error_code, extra=fields)
    except (IllegalTransition, Unavailable) as lost:
        # Our own ending, where only the answer was lost; or whoever took it over came to one.
        unknown = again and isinstance(lost, Unavailable)
        ended = None if unknown else ending(record.export_id, stores.records)
        if ended is not None:
            drop_token(record.export_id, token_ref, stores.records, stores.tokens)
            return ExitCode.FAILED if ended is State.FAILED else ExitCode.DONE
        if isinstance(lost, Unavailable):
            log.error("the verdict could not be recorded, the lease will run out: %s", lost.message)
            return ExitCode.TRY_AGAIN
        log.warning("not recorded: %s", lost.message)
        left = found_now(record.export_id, stores.records)
        # Where it waits, it was us who gave it back, and were told nothing of that.
        return ExitCode.TRY_AGAIN if again and left and left.state is State.QUEUED else ExitCode.DONE
    if again:
        return ExitCode.TRY_AGAIN
    if not error.retryable:
        drop_token(record.export_id, token_ref, stores.records, stores.tokens)
    return ExitCode.FAILED
