"""Where records are kept: training jobs (read, and written back to) and exports (compare-and-set)."""

import logging
import random
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import pydantic

from dispatcher.contract import ExportRecord, State, TrainingJob
from dispatcher.errors import ExportError, Misconfigured, NotFound, SourceError, Unavailable

logger = logging.getLogger(__name__)

_UPDATE_ATTEMPTS = 50
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.2
"""Seconds."""
Stored = TypeVar("Stored")
"""A stored document, in whatever form a store reads it."""


class RecordStore(Protocol):
    """The documents `training_jobs/{job_id}` and `exports/{export_id}`.

    Every method raises Unavailable when the store does not answer; a change may have been made all the same, and one
    that the transport sent twice says that it was not made, as to whoever comes second.
    """

    def get_job(self, job_id: str) -> TrainingJob | None:
        """The training job, or None.

        Raises:
            SourceError: The document is damaged, or lacks what an export needs (`job_document_invalid`).
        """

    def put_job(self, job_id: str, document: dict[str, Any]) -> bool:
        """Create the document; False when there is one already, which stays as it is."""

    def get_export(self, export_id: str) -> ExportRecord | None:
        """The record, or None.

        Raises:
            ExportError: It is there and cannot be read (`record_invalid`).
        """

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        """Create the record; False when there is one already, which stays as it is."""

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        """Put `new` in the place of `old`; False when the stored revision is not `old`'s any more.

        `job_result` holds dotted paths ("artifacts.raw.merged") that are set in the training job's document
        in the same transaction; nothing else of that document is touched.
        """

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
        """At most `limit` records ordered by export id, those after the id `after`.

        One that cannot be read is left out and logged as an error: it must not stop the sweep of all others.

        Raises:
            ExportError: `strict`, and one cannot be read (`record_invalid`).
        """

    def list_uncollected(self, states: Collection[State], *, until: datetime, limit: int = 100) -> list[ExportRecord]:
        """At most `limit` records in one of `states` whose `uncollected_since` is `until` or before, the oldest first.

        One that cannot be read is left out and logged as an error.
        """

    def close(self) -> None:
        """Release what is open; the store is not used afterwards."""


def update(
    store: RecordStore,
    export_id: str,
    change: Callable[[ExportRecord], ExportRecord | None],
    *,
    job_result: Mapping[str, str] | None = None,
) -> ExportRecord:
    """Read, change, compare-and-set, again until it holds; the record as it is then.

    `change` must be pure, since it runs again whenever someone else was faster. None means: leave it.

    Raises:
        NotFound: There is no such export (`export_not_found`).
        Unavailable: Others were faster too many times.
    """
    for attempt in range(_UPDATE_ATTEMPTS):
        if attempt:
            # Contenders in step with each other would meet again every time.
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)))  # noqa: S311  # no secret
        old = store.get_export(export_id)
        if old is None:
            raise NotFound(f"there is no export {export_id}", code="export_not_found")
        new = change(old)
        if new is None:
            return old
        if store.replace_export(old, new, job_result=job_result):
            return new
    raise Unavailable(f"export {export_id} keeps changing under us: ask again")


def every_export(store: RecordStore, states: Collection[State], *, page: int = 100) -> Iterator[ExportRecord]:
    """Every record in one of `states`, page by page."""
    after: str | None = None
    while records := store.list_exports(states=states, limit=page, after=after):
        yield from records
        after = records[-1].export_id


def readable_page(
    fetch: Callable[[str | None, int], Sequence[tuple[str, Stored]]],
    read: Callable[[str, Stored], ExportRecord],
    *,
    limit: int,
    after: str | None = None,
    strict: bool = False,
) -> list[ExportRecord]:
    """A page of a listing: what can be read of what `fetch` finds.

    Args:
        fetch: Given an id and a number, that many stored documents that come after that id.
        read: Raises an ExportError for what cannot be read.
        limit: The most records to return.
        after: The id that the page begins after.
        strict: Whether what cannot be read is raised, instead of left out.
    """
    found: list[ExportRecord] = []
    # A page that holds unreadable documents is filled up: to whoever turns pages, a short one is the last.
    while len(found) < limit:
        missing = limit - len(found)
        rows = fetch(after, missing)
        for export_id, document in rows:
            try:
                found.append(read(export_id, document))
            except ExportError as error:
                if strict:
                    raise
                logger.error("export %s is left out of a listing: %s", export_id, error)
        if len(rows) < missing:
            break
        after = rows[-1][0]
    return found


def job_of(job_id: str, document: dict[str, Any]) -> TrainingJob:
    """The training job in a document.

    Raises:
        SourceError: It lacks what an export needs (`job_document_invalid`).
    """
    try:
        return TrainingJob.from_document(job_id, document)
    except pydantic.ValidationError as error:
        fields = ", ".join(sorted({str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}))
        raise SourceError(f"training job {job_id} lacks a usable {fields}", code="job_document_invalid") from error


def unreadable(export_id: str) -> ExportError:
    """What is raised for a stored record that is none of ours."""
    return ExportError(
        f"the stored record of export {export_id} cannot be read; was it written by a newer version?",
        code="record_invalid",
    )


def open_records(url: str) -> RecordStore:
    """The record store that a URL selects: `sqlite:///file` or `firestore://project/database`."""
    # Each stands on this file, so it cannot be imported above; and Google's client takes half a second.
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        from dispatcher.sqlite_records import SqliteRecords

        return SqliteRecords(Path(unquote(parts.path)))
    match = re.fullmatch(r"firestore://([a-z0-9:.-]+)/([a-z0-9-]+|\(default\))", url)
    if match:
        from dispatcher.firestore_records import FirestoreRecords

        return FirestoreRecords(match[1], match[2])
    raise Misconfigured(f"record store {url!r}: expected sqlite:///file or firestore://project/database")
