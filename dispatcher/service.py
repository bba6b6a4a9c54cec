"""The use cases, with no I/O of their own: submit, status, list, cancel."""

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import Any

from dispatcher import lifecycle
from dispatcher.admission import Admission, is_candidate
from dispatcher.artifacts import ArtifactStore, StoredFile
from dispatcher.contract import (
    RESULT_FIELD,
    UNFINISHED,
    Artifact,
    ExportRecord,
    ExportRequest,
    ExportType,
    State,
    TrainingJob,
    fingerprint_of,
    is_export_id,
)
from dispatcher.downloads import DownloadLinks, Downloads
from dispatcher.errors import (
    Conflict,
    ExportError,
    Forbidden,
    JobNotCompleted,
    NotFound,
    Unavailable,
)
from dispatcher.lifecycle import Actor, transition
from dispatcher.published import is_whole
from dispatcher.records import RecordStore, update
from dispatcher.runner import JobRunner
from dispatcher.tokens import TokenStore
from dispatcher.trigger import RACES, Trigger

logger = logging.getLogger(__name__)


class _Standing(Enum):
    """What an earlier export is worth to a new request for it."""

    CURRENT = auto()
    STALE = auto()
    DAMAGED = auto()
    """Its manifest is there, but not all that the manifest lists."""


class Service:
    """What a caller can ask of the dispatcher; every change of a record is one compare-and-set.

    Args:
        trigger: Publishes what was queued.
        download_url_seconds: How long the URLs of a finished export's files are good.
        clock: The time now, in UTC.
    """

    def __init__(
        self,
        *,
        records: RecordStore,
        artifacts: ArtifactStore,
        runner: JobRunner,
        tokens: TokenStore,
        trigger: Trigger,
        max_unfinished_per_user: int = 20,
        download_url_seconds: int = 3600,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._records = records
        self._artifacts = artifacts
        self._runner = runner
        self._tokens = tokens
        self._trigger = trigger
        self._admission = Admission(records, max_unfinished_per_user)
        self._clock = clock
        self._links = DownloadLinks(artifacts, timedelta(seconds=download_url_seconds), clock)

    def now(self) -> datetime:
        """The service's clock, so that whoever shows a record judges its lease by the same time."""
        return self._clock()

    def submit(self, request: ExportRequest, user: str, *, traceparent: str | None = None) -> ExportRecord:
        """Ask for an export; the record that answers: `completed`, or waiting or under way.

        Raises:
            NotFound: No such job (`job_not_found`), or its adapter is gone (`adapter_gone`).
            Forbidden: The job is someone else's.
            JobNotCompleted: There is nothing to export yet.
            TooManyExports: The caller has too many unfinished exports.
            Unavailable: The request may be recorded; asking again does no harm and finishes it.
        """
        job = self._records.get_job(request.job_id)
        if job is None:
            raise NotFound(f"there is no training job {request.job_id}", code="job_not_found")
        if job.user_id != user:
            raise Forbidden(f"training job {request.job_id} belongs to someone else")
        if job.status != "completed":
            raise JobNotCompleted(f"training job {job.job_id} is {job.status!r}: it can be exported once completed")
        files = self._artifacts.list(job.adapter_path) if job.adapter_path else []
        if job.adapter_path is None or not files:
            raise NotFound(f"the adapter of {job.job_id} is gone from {job.adapter_path}", code="adapter_gone")
        if request.export_type is ExportType.ADAPTER:
            return self._delivered(request, job, job.adapter_path, files)
        return self._queued(request, user, _fingerprint(files), traceparent)

    def status(self, export_id: str, user: str) -> ExportRecord:
        """The caller's own export.

        Raises:
            NotFound: No such export (`export_not_found`).
            Forbidden: It is someone else's.
        """
        record = self._records.get_export(export_id) if is_export_id(export_id) else None
        if record is None:
            raise NotFound(f"there is no export {export_id[:250]}", code="export_not_found")
        if record.user_id != user:
            raise Forbidden(f"export {export_id} belongs to someone else")
        return record

    def downloads(self, record: ExportRecord) -> Downloads | None:
        """Where the files of a completed export can be fetched; None before that, and where they cannot be told."""
        return self._links.of(record)

    def list_exports(
        self, user: str, *, job_id: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[ExportRecord]:
        """The caller's own exports, by id."""
        return self._records.list_exports(user_id=user, job_id=job_id, limit=limit, after=after)

    def cancel(self, export_id: str, user: str) -> ExportRecord:
        """Flag an export as cancelled; whoever works on it sees that at the next heartbeat. Again is no harm.

        Raises:
            NotFound, Forbidden: As for `status`.
            Conflict: It is completed, or has failed, already.
        """
        self.status(export_id, user)
        execution: str | None = None
        token_ref: str | None = None

        def flagged(record: ExportRecord) -> ExportRecord | None:
            nonlocal execution, token_ref
            if record.state not in UNFINISHED | {State.CANCELLED}:
                raise Conflict(f"export {export_id} is {record.state}: there is nothing to cancel")
            execution = record.lease.owner if record.state is State.RUNNING and record.lease else record.execution
            if record.state is State.CANCELLED:
                return None
            token_ref = record.token_ref
            return transition(record, State.CANCELLED, by=Actor.CALLER, now=self._clock(), token_ref=None)

        try:
            record = update(self._records, export_id, flagged)
        finally:
            # Also where the answer was lost: then the record may have forgotten it already.
            if token_ref:
                with _logged("the token is left to its time to live"):
                    self._tokens.delete(token_ref)
        # The flag is set, and that is what counts: the execution stops at its next heartbeat.
        with _logged(f"execution {execution} could not be told to stop"):
            if execution and not self._records.list_exports(job_id=record.job_id, states=UNFINISHED, limit=1):
                self._runner.cancel(execution)
        return record

    def _delivered(
        self, request: ExportRequest, job: TrainingJob, adapter: str, files: list[StoredFile]
    ) -> ExportRecord:
        fingerprint = _fingerprint(files)
        artifact = Artifact(
            kind=ExportType.ADAPTER,
            uri=adapter,
            version=fingerprint[:12],
            bytes=sum(file.size for file in files),
            files=len(files),
            manifest=None,
        )
        result = {RESULT_FIELD[ExportType.ADAPTER]: adapter}
        for _ in range(RACES):
            old = self._records.get_export(request.export_id)
            if old and old.state is State.COMPLETED and old.artifacts == (artifact,):
                return old
            now = self._clock()
            first = lifecycle.requested(
                request, user_id=job.user_id, adapter_fingerprint=fingerprint, token_ref=None, now=now
            )
            new = lifecycle.delivered(old or first, adapter=artifact, adapter_fingerprint=fingerprint, now=now)
            if old is None:
                done = self._records.create_export(new, job_result=result)
            else:
                done = self._records.replace_export(old, new, job_result=result)
            if done:
                return new
        raise _contended(request.export_id)

    def _queued(self, request: ExportRequest, user: str, fingerprint: str, traceparent: str | None) -> ExportRecord:
        ref: str | None = None
        for _ in range(RACES):
            old, now = self._records.get_export(request.export_id), self._clock()
            standing = _Standing.STALE if old is None else self._standing(old, fingerprint)
            if old is not None and standing is _Standing.CURRENT:
                if ref is not None:  # the export was completed meanwhile, without it
                    self._tokens.delete(ref)
                return old
            if old is not None and old.state in UNFINISHED:
                back = self._trigger.reclaimed(old)
                if back is not None:
                    self._records.replace_export(old, back)
                    continue
                ref = ref or self._stored_token(request)
                record = self._with_token(old, ref)
                if record.state not in UNFINISHED:
                    continue
                if record.state is not State.QUEUED or not self._trigger.is_overdue(record):
                    return record
                if is_candidate(record) and not self._admission.is_admitted(record):
                    raise self._admission.refusal()  # whoever wrote it withdraws it
                return self._trigger.publish(record, traceparent)
            self._admission.ask(user)
            ref = ref or self._stored_token(request)
            if old is None:
                new = lifecycle.requested(
                    request, user_id=user, adapter_fingerprint=fingerprint, token_ref=ref, now=now
                )
                won = self._records.create_export(new)
            else:
                # Nothing published is overwritten, so what is damaged is made anew as a version of its own.
                damaged = standing is _Standing.DAMAGED
                anew: dict[str, Any] = {"force_nonce": secrets.token_hex(4)} if damaged else {}
                new = transition(
                    old,
                    State.QUEUED,
                    by=Actor.CALLER,
                    now=now,
                    adapter_fingerprint=fingerprint,
                    user_id=user,
                    token_ref=ref or (old.token_ref if lifecycle.needs_token(old) else None),
                    **anew,
                )
                won = self._records.replace_export(old, new)
            if not won:
                continue
            if self._admission.is_admitted(new):
                return self._trigger.publish(new, traceparent)
            withdrawn = lifecycle.withdrawn(new, before=old, now=self._clock())
            if self._records.replace_export(new, withdrawn):
                if ref is not None and withdrawn.token_ref != ref:
                    with _logged("the token is left to its time to live"):
                        self._tokens.delete(ref)
                raise self._admission.refusal()
        raise _contended(request.export_id)

    def _standing(self, record: ExportRecord, fingerprint: str) -> _Standing:
        """Whether a finished export still is what a request for it would make."""
        manifests = [artifact.manifest for artifact in record.artifacts if artifact.manifest is not None]
        complete = bool(manifests) and len(manifests) == len(record.artifacts)
        if record.state is not State.COMPLETED or record.adapter_fingerprint != fingerprint or not complete:
            return _Standing.STALE
        try:
            whole = all(is_whole(self._artifacts, manifest) for manifest in manifests)
        except NotFound:
            return _Standing.STALE
        return _Standing.CURRENT if whole else _Standing.DAMAGED

    def _stored_token(self, request: ExportRequest) -> str | None:
        if request.hf_token is None:
            return None
        return self._tokens.put(request.export_id, request.hf_token.get_secret_value())

    def _with_token(self, record: ExportRecord, ref: str | None) -> ExportRecord:
        """The record, after a token that came with a repeated request was put where its exporter looks.

        An export that has ended meanwhile is left as it is, and so is what is stored for it: a record that failed
        for a passing reason still refers to it.
        """
        if ref is None:
            return record

        def referring(current: ExportRecord) -> ExportRecord | None:
            lacks_it = current.state in UNFINISHED and current.token_ref != ref
            return lifecycle.noted(current, self._clock(), token_ref=ref) if lacks_it else None

        return update(self._records, record.export_id, referring)


def _fingerprint(files: list[StoredFile]) -> str:
    return fingerprint_of([(file.name, file.size, file.crc32c) for file in files])


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Logs an error of ours that changes nothing any more."""
    try:
        yield
    except ExportError as error:
        logger.warning("%s: %s", what, error)


def _contended(export_id: str) -> Unavailable:
    return Unavailable(f"export {export_id} keeps changing under us: ask again")
