"""Records in one SQLite file: what a laptop has in the place of Firestore."""

import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pydantic

from dispatcher.contract import ExportRecord, State, TrainingJob
from dispatcher.errors import SourceError, Unavailable
from dispatcher.records import job_of, readable_page, unreadable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS training_jobs (job_id TEXT PRIMARY KEY, document TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS exports (
    export_id TEXT PRIMARY KEY, job_id TEXT NOT NULL, user_id TEXT NOT NULL, state TEXT NOT NULL,
    revision INTEGER NOT NULL, document TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS exports_by_user ON exports (user_id, state);
CREATE INDEX IF NOT EXISTS exports_by_job ON exports (job_id);
"""
# Documents are read as bytes: what is not even UTF-8 is then one damaged document, not a failed query.
_SELECT_JOB = "SELECT CAST(document AS BLOB) FROM training_jobs WHERE job_id = ?"
_SELECT_EXPORT = "SELECT CAST(document AS BLOB) FROM exports WHERE export_id = ?"
_SELECT_UNCOLLECTED = """
WITH ended AS MATERIALIZED (
    SELECT export_id, document, CASE WHEN json_valid(document)
        THEN julianday(json_extract(document, '$.uncollected_since')) END AS since
    FROM exports WHERE state IN (SELECT value FROM json_each(:states))
)
SELECT export_id, CAST(document AS BLOB) FROM ended
WHERE since <= julianday(:until) AND (:after IS NULL OR (since, export_id) > (
    SELECT since, export_id FROM ended WHERE export_id = :after
)) ORDER BY since, export_id LIMIT :limit
"""


class SqliteRecords:
    """Records in one SQLite file, shared by threads and processes."""

    def __init__(self, path: Path, *, busy_seconds: float = 10.0) -> None:
        self._path = path
        self._busy_seconds = busy_seconds
        # One connection per thread at a time, reused: a threaded server makes a thread per request.
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def get_job(self, job_id: str) -> TrainingJob | None:
        with self._connection() as connection:
            row = connection.execute(_SELECT_JOB, (job_id,)).fetchone()
        return None if row is None else job_of(job_id, _document(job_id, row[0]))

    def put_job(self, job_id: str, document: dict[str, Any]) -> bool:
        with self._connection() as connection:
            cursor = connection.execute(
                "INSERT INTO training_jobs VALUES (?, ?) ON CONFLICT DO NOTHING",
                (job_id, json.dumps(document)),
            )
            return cursor.rowcount == 1

    def get_export(self, export_id: str) -> ExportRecord | None:
        with self._connection() as connection:
            row = connection.execute(_SELECT_EXPORT, (export_id,)).fetchone()
        return None if row is None else _record(export_id, row[0])

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        row = (record.export_id, record.job_id, record.user_id, record.state, record.revision, _text(record))
        with self._transaction() as connection:
            cursor = connection.execute("INSERT INTO exports VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
            if cursor.rowcount == 1:
                _write_back(connection, record.job_id, job_result)
            return cursor.rowcount == 1

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        row = (new.job_id, new.user_id, new.state, new.revision, _text(new), old.export_id, old.revision)
        with self._transaction() as connection:
            cursor = connection.execute(
                "UPDATE exports SET job_id = ?, user_id = ?, state = ?, revision = ?, document = ? "
                "WHERE export_id = ? AND revision = ?",
                row,
            )
            if cursor.rowcount == 1:
                _write_back(connection, new.job_id, job_result)
            return cursor.rowcount == 1

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
        query = (
            "SELECT export_id, CAST(document AS BLOB) FROM exports WHERE (:user IS NULL OR user_id = :user) "
            "AND (:job IS NULL OR job_id = :job) AND (:after IS NULL OR export_id > :after) "
            "AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states))) "
            "ORDER BY export_id LIMIT :limit"
        )
        wanted = None if states is None else json.dumps(sorted(states))

        def fetch(after: str | None, number: int) -> list[tuple[str, bytes]]:
            values = {"user": user_id, "job": job_id, "after": after, "states": wanted, "limit": number}
            with self._connection() as connection:
                return connection.execute(query, values).fetchall()

        return readable_page(fetch, _record, limit=limit, after=after, strict=strict)

    def list_uncollected(self, states: Collection[State], *, until: datetime, limit: int = 100) -> list[ExportRecord]:
        def fetch(after: str | None, number: int) -> list[tuple[str, bytes]]:
            values = {
                "states": json.dumps(sorted(states)),
                "until": until.isoformat(),
                "after": after,
                "limit": number,
            }
            with self._connection() as connection:
                return connection.execute(_SELECT_UNCOLLECTED, values).fetchall()

        return readable_page(fetch, _record, limit=limit)

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of our own for now.

        Raises:
            Unavailable: The file is locked for too long, cannot be read or written, or is no database.
        """
        try:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            connection = connection or self._connect()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()
        except (sqlite3.Error, OSError) as error:
            raise Unavailable(f"the record store {self._path} does not answer: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            # Immediate: two writers that both began by reading could otherwise only deadlock.
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self._path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # An accepted request must outlive a power cut, so every commit reaches the disk.
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection


def _with_result(document: dict[str, Any], job_result: Mapping[str, str]) -> dict[str, Any]:
    """A copy of the document with each dotted path set, and everything else as it was."""
    copy = dict(document)
    for dotted, value in job_result.items():
        *parents, leaf = dotted.split(".")
        place = copy
        for name in parents:
            child = place.get(name)
            place[name] = dict(child) if isinstance(child, dict) else {}
            place = place[name]
        place[leaf] = value
    return copy


def _write_back(connection: sqlite3.Connection, job_id: str, job_result: Mapping[str, str] | None) -> None:
    row = connection.execute(_SELECT_JOB, (job_id,)).fetchone()
    # The training service may have deleted its job meanwhile; the export is valid all the same.
    if job_result and row is not None:
        text = json.dumps(_with_result(_document(job_id, row[0]), job_result))
        connection.execute("UPDATE training_jobs SET document = ? WHERE job_id = ?", (text, job_id))


def _document(job_id: str, stored: bytes) -> dict[str, Any]:
    try:
        document = json.loads(stored)
    except (ValueError, RecursionError) as error:
        message = f"the document of training job {job_id} is not JSON: it is damaged, write it again"
        raise SourceError(message, code="job_document_invalid") from error
    if not isinstance(document, dict):
        message = f"the document of training job {job_id} is a {type(document).__name__}: expected a JSON object"
        raise SourceError(message, code="job_document_invalid")
    return document


def _text(record: ExportRecord) -> str:
    return record.model_dump_json()


def _record(export_id: str, stored: bytes) -> ExportRecord:
    try:
        return ExportRecord.model_validate_json(stored)
    except (pydantic.ValidationError, RecursionError) as error:
        raise unreadable(export_id) from error
