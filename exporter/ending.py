"""The end of an export, as its record tells it, and what is left to do after it: its token goes."""

import logging

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import ExportError, SourceError
from dispatcher.lifecycle import needs_token, noted
from dispatcher.records import RecordStore, update
from dispatcher.tokens import TokenStore
from exporter.lease import utc_now

log = logging.getLogger(__name__)


def fault_of(error: BaseException) -> ExportError | None:
    """What a fault is in the record; None for what is no fault, but the end of the process."""
    if isinstance(error, Exception):
        return ExportError(f"an unexpected fault: {type(error).__name__}: {error}")
    if type(error).__module__ == "pyo3_runtime":  # no Exception: a panic in a library that is written in Rust
        return SourceError(
            f"a library gives up on a file of base or adapter, probably its tokenizer: {error}. Save it again.",
            code="file_unreadable",
        )
    return None


def found_now(export_id: str, records: RecordStore) -> ExportRecord | None:
    """The record; None where there is none, and where nobody can tell."""
    try:
        return records.get_export(export_id)
    except ExportError:
        return None


def ending(export_id: str, records: RecordStore) -> State | None:
    """`completed` or `failed` where an export has come to an end for good; None else, and where nobody can tell."""
    record = found_now(export_id, records)
    if record is None:
        return None
    failed_for_good = record.error is not None and not record.error.retryable
    return record.state if record.state is State.COMPLETED or failed_for_good else None


def drop_token(export_id: str, token_ref: str | None, records: RecordStore, tokens: TokenStore) -> None:
    """Delete the token of an export that has ended, then take out of its record where it was."""

    def forgotten(record: ExportRecord) -> ExportRecord | None:
        refers = record.token_ref == token_ref and not needs_token(record)
        return noted(record, utc_now(), token_ref=None) if refers else None

    if token_ref is None:
        return
    try:
        tokens.delete(token_ref)
        update(records, export_id, forgotten)
    except ExportError as error:
        # The verdict is recorded, and that is what counts.
        log.warning("the token is left to its time to live: %s", error.message)


def tidy(job_id: str, execution: str, records: RecordStore, tokens: TokenStore) -> None:
    """Do what an attempt of this execution had still to do when it was killed just after the end of an export.

    Raises:
        Unavailable: The record store does not tell the job's exports.
    """
    for record in records.list_exports(job_id=job_id):
        if record.execution == execution and not needs_token(record):
            drop_token(record.export_id, record.token_ref, records, tokens)
