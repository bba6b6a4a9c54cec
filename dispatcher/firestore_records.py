"""Records in Firestore: documents `training_jobs/{job_id}` and `exports/{export_id}`.

Every change is one write with a precondition, so there are no locks to wait for and nothing to roll back.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pydantic
from google.api_core import exceptions as api
from google.api_core.retry import Retry, if_exception_type
from google.cloud import firestore
from google.cloud.firestore_v1.base_document import DocumentSnapshot
from google.cloud.firestore_v1.base_query import FieldFilter

from dispatcher.contract import ExportRecord, State, TrainingJob
from dispatcher.google_errors import translating
from dispatcher.records import job_of, readable_page, unreadable

CALL_SECONDS = 5.0
"""How long one call may take."""
RETRY_SECONDS = 10.0
"""How long a call that meets a passing fault is repeated; a caller waits for the answer meanwhile."""
_PASSING = if_exception_type(api.TooManyRequests, api.ServerError, api.Aborted)
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
        found = self._read(self._jobs.document(job_id))
        return job_of(job_id, found.to_dict() or {}) if found.exists else None

    def put_job(self, job_id: str, document: dict[str, Any]) -> bool:
        return self._committed(lambda batch: batch.create(self._jobs.document(job_id), document))

    def get_export(self, export_id: str) -> ExportRecord | None:
        found = self._read(self._exports.document(export_id))
        return _record(export_id, found) if found.exists else None

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        place = self._exports.document(record.export_id)

        def create(batch: firestore.WriteBatch) -> None:
            batch.create(place, record.model_dump())

        return self._written(create, record, job_result)

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        place = self._exports.document(old.export_id)
        found = self._read(place)
        if not found.exists or found.get("revision") != old.revision:
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
    ) -> list[ExportRecord]:
        if states is not None and not states:
            return []  # which Firestore refuses as a filter
        query: firestore.Query = self._exports.order_by("__name__")
        for field, value in (("user_id", user_id), ("job_id", job_id)):
            if value is not None:
                query = query.where(filter=FieldFilter(field, "==", value))
        if states is not None:
            query = query.where(filter=FieldFilter("state", "in", sorted(states)))

        def fetch(after: str | None, number: int) -> list[tuple[str, Snapshot]]:
            page = query.limit(number)
            if after is not None:
                page = page.start_after({"__name__": self._exports.document(after)})
            with translating(self._name):
                return [(found.id, found) for found in page.get(retry=_retry(), timeout=CALL_SECONDS)]

        return readable_page(fetch, _record, limit=limit, after=after)

    def close(self) -> None:
        self._client.close()

    def _read(self, place: firestore.DocumentReference) -> Snapshot:
        with translating(self._name):
            return place.get(retry=_retry(), timeout=CALL_SECONDS)

    def _written(
        self,
        write: Callable[[firestore.WriteBatch], None],
        record: ExportRecord,
        job_result: Mapping[str, str] | None,
    ) -> bool:
        """Whether a write of an export held, together with what it says in the training job's document."""

        def with_result(batch: firestore.WriteBatch) -> None:
            write(batch)
            if job_result:
                # Keys are field paths: what lies beside them in the document is not touched.
                batch.update(self._jobs.document(record.job_id), dict(job_result))

        def is_there() -> bool:
            return self.get_export(record.export_id) == record

        try:
            return self._committed(with_result, is_there)
        except _GoneError:
            # The training service may have deleted its job meanwhile; the export is valid all the same.
            if not job_result or self._read(self._jobs.document(record.job_id)).exists:
                return False
        try:
            return self._committed(write, is_there)
        except _GoneError:
            return False

    def _committed(
        self, write: Callable[[firestore.WriteBatch], None], is_there: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether a write with a precondition held.

        Args:
            write: Says what to write.
            is_there: Whether what is stored is what was to be written; asked when an answer was lost, since that
                write may have held, and its repetition then meets its own result.
        """
        unanswered: list[Exception] = []
        batch = self._client.batch()
        write(batch)
        with translating(self._name):
            try:
                batch.commit(retry=_retry(unanswered.append), timeout=CALL_SECONDS)
            except _LOST:
                return bool(unanswered) and is_there()
            except api.NotFound as error:
                raise _GoneError from error
        return True


class _GoneError(Exception):
    """A document that was to be updated does not exist."""


def _retry(on_error: Callable[[Exception], object] | None = None) -> Retry:
    return Retry(predicate=_PASSING, initial=0.1, maximum=2.0, timeout=RETRY_SECONDS, on_error=on_error)


def _record(export_id: str, found: Snapshot) -> ExportRecord:
    try:
        return ExportRecord.model_validate(found.to_dict())
    except pydantic.ValidationError as error:
        raise unreadable(export_id) from error
