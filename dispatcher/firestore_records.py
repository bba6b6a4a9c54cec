"""Records in Firestore: documents `training_jobs/{job_id}` and `exports/{export_id}`.

Every change is one write with a precondition, so there are no locks to wait for and nothing to roll back.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from google.api_core import exceptions as api
from google.api_core.retry import Retry, if_exception_type
from google.cloud import firestore
from google.cloud.firestore_v1.base_document import DocumentSnapshot
from google.cloud.firestore_v1.base_query import FieldFilter

from dispatcher.contract import ExportRecord, State, TrainingJob
from dispatcher.errors import ExportError, SourceError
from dispatcher.google_errors import translating
from dispatcher.records import job_of, readable_page, unreadable

logger = logging.getLogger(__name__)

CALL_SECONDS = 5.0
"""How long one call may take."""
RETRY_SECONDS = 10.0
"""How long a call that meets a passing fault is repeated; a caller waits for the answer meanwhile."""
_PASSING = if_exception_type(api.TooManyRequests, api.ServerError, api.Aborted)
_JOB_FIELDS = (
    *("user_id", "status", "base_model_id", "base_model_revision", "merge_base", "provider"),
    *("adapter_path", "artifacts.raw.adapter"),
)
"""What an export needs of a training job; whatever else is in there is not ours, and may be anything."""
_LOST = (api.AlreadyExists, api.FailedPrecondition)
"""How Firestore says that a document is not what the precondition wants: a lost race."""

Snapshot = DocumentSnapshot[firestore.DocumentReference]


class FirestoreRecords:
    """Records in a Firestore database (native mode).

    Args:
        project: Google Cloud project id.
        database: Database id, often `(default)`.
    """

    def __init__(self, project: str, database: str) -> None:
        self._name = f"Firestore database {database} of project {project}"
        with translating(self._name):
            self._client = firestore.Client(project=project, database=database)
        self._jobs = self._client.collection("training_jobs")
        self._exports = self._client.collection("exports")

    def get_job(self, job_id: str) -> TrainingJob | None:
        try:
            found = self._read(self._jobs.document(job_id), _JOB_FIELDS)
            return job_of(job_id, found.to_dict() or {}) if found.exists else None
        except ValueError as error:
            message = f"training job {job_id} holds a value that no export can use: {error}"
            raise SourceError(message, code="job_document_invalid") from error

    def put_job(self, job_id: str, document: dict[str, Any]) -> bool:
        place = self._jobs.document(job_id)
        with translating(self._name):
            return self._committed(
                lambda batch: batch.create(place, document), lambda: self._read(place).to_dict() == document
            )

    def get_export(self, export_id: str) -> ExportRecord | None:
        return self._record(export_id, None)

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        place = self._exports.document(record.export_id)

        def create(batch: firestore.WriteBatch) -> None:
            batch.create(place, record.model_dump())

        return self._written(create, record, job_result)

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        place = self._exports.document(old.export_id)
        found = self._read(place, ["revision"])
        if (found.to_dict() or {}).get("revision") != old.revision:
            return False
        unchanged = self._client.write_option(last_update_time=found.update_time)

        def replace(batch: firestore.WriteBatch) -> None:
            # All of our fields are always there, so this replaces the document but for fields that are not ours.
            batch.update(place, new.model_dump(), option=unchanged)

        return self._written(replace, new, job_result)

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
        if states is not None and not states:
            return []  # which Firestore refuses as a filter
        query: firestore.Query = self._exports.order_by("__name__")
        for field, value in (("user_id", user_id), ("job_id", job_id)):
            if value is not None:
                query = query.where(filter=FieldFilter(field, "==", value))
        if states is not None:
            query = query.where(filter=FieldFilter("state", "in", sorted(states)))

        def fetch(after: str | None, number: int) -> list[tuple[str, Snapshot | None]]:
            page = query.limit(number)
            if after is not None:
                page = page.start_after({"__name__": self._exports.document(after)})
            return [(found.id, whole) for found, whole in self._page(page, "revision")]

        return readable_page(fetch, self._listed, limit=limit, after=after, strict=strict)

    def list_uncollected(self, states: Collection[State], *, until: datetime, limit: int = 100) -> list[ExportRecord]:
        query = self._exports.where(filter=FieldFilter("state", "in", sorted(states)))
        query = query.where(filter=FieldFilter("uncollected_since", "<=", until))
        query = query.order_by("uncollected_since").order_by("__name__")
        last: Snapshot | None = None

        def fetch(after: str | None, number: int) -> list[tuple[str, Snapshot | None]]:
            nonlocal last
            page = query.limit(number)
            rows = self._page(page if last is None else page.start_after(last), "uncollected_since")
            last = rows[-1][0] if rows else last
            return [(found.id, whole) for found, whole in rows]

        return readable_page(fetch, self._listed, limit=limit)

    def close(self) -> None:
        self._client.close()

    def _read(self, place: firestore.DocumentReference, fields: Collection[str] | None = None) -> Snapshot:
        with translating(self._name):
            return place.get(field_paths=fields, retry=_retry(), timeout=CALL_SECONDS)

    def _page(self, page: firestore.Query, field: str) -> list[tuple[Snapshot, Snapshot | None]]:
        """Of each document that a query finds `field` at least, and all of it, or None where it must be read alone."""
        with translating(self._name):
            try:
                return [(found, found) for found in page.get(retry=_retry(), timeout=CALL_SECONDS)]
            except ValueError:
                # The client cannot decode one of them, and gives none.
                found = page.select([field]).get(retry=_retry(), timeout=CALL_SECONDS)
                return [(each, None) for each in found]

    def _listed(self, export_id: str, found: Snapshot | None) -> ExportRecord:
        record = self._record(export_id, found)
        if record is None:
            raise ExportError("it was deleted while it was listed", code="export_not_found")
        return record

    def _record(self, export_id: str, found: Snapshot | None) -> ExportRecord | None:
        """The record in a document, which is read now if it was not yet."""
        try:
            found = found or self._read(self._exports.document(export_id))
            if not found.exists:
                return None
            record = ExportRecord.model_validate(found.to_dict())
        except ValueError as error:  # pydantic's is one, and so is the client's where it cannot decode a value
            raise unreadable(export_id) from error
        if record.export_id != export_id:  # a copy: pages are turned by the document's id
            raise unreadable(export_id)
        return record

    def _written(
        self,
        write: Callable[[firestore.WriteBatch], None],
        record: ExportRecord,
        job_result: Mapping[str, str] | None,
    ) -> bool:
        """Whether a write of an export held, together with what it says in the training job's document."""

        def with_result(batch: firestore.WriteBatch) -> None:
            write(batch)
            # Keys are field paths: what lies beside them in the document is not touched.
            batch.update(self._jobs.document(record.job_id), dict(job_result or {}))

        def is_there() -> bool:
            return self.get_export(record.export_id) == record

        with translating(self._name):
            if job_result:
                try:
                    return self._committed(with_result, is_there)
                except (api.NotFound, api.InvalidArgument) as error:
                    # It is the training service's, which may have deleted it or filled it to Firestore's limit; the
                    # export is valid all the same.
                    logger.warning("the document of job %s did not take its result: %s", record.job_id, error)
            try:
                return self._committed(write, is_there)
            except api.NotFound:
                return False

    def _committed(self, write: Callable[[firestore.WriteBatch], None], is_there: Callable[[], bool]) -> bool:
        """Whether a write with a precondition held.

        Args:
            write: Says what to write.
            is_there: Whether what is stored is what was to be written; asked when an answer was lost, since that
                write may have held, and its repetition then meets its own result.
        """
        unanswered: list[Exception] = []
        batch = self._client.batch()
        write(batch)
        try:
            batch.commit(retry=_retry(unanswered.append), timeout=CALL_SECONDS)
        except _LOST:
            return bool(unanswered) and is_there()
        return True


def _retry(on_error: Callable[[Exception], object] | None = None) -> Retry:
    return Retry(predicate=_PASSING, initial=0.1, maximum=2.0, timeout=RETRY_SECONDS, on_error=on_error)
