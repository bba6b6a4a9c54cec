"""What travels in HTTP bodies, and in what the CLI prints: the request as read, a record as shown."""

from dataclasses import asdict
from datetime import datetime
from typing import Any

import pydantic

from dispatcher.contract import RESULT_FIELD, ExportRecord, ExportRequest, State
from dispatcher.downloads import Downloads
from dispatcher.errors import InvalidRequest
from dispatcher.lifecycle import holds_live_lease
from dispatcher.logs import clean


def export_request(document: dict[str, Any]) -> ExportRequest:
    """The request in a document; what is refused is named by field, and no value is repeated.

    Raises:
        InvalidRequest: A field is missing, unknown or wrong.
    """
    try:
        return ExportRequest.model_validate(document)
    except pydantic.ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        texts = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in faults]
    # Outside the handler, so without a cause: that error holds the input, and a log would show it.
    raise InvalidRequest(clean("; ".join(texts), limit=1000))


def shown_state(record: ExportRecord, now: datetime) -> State:
    """The state as a caller may rely on it: work whose lease ran out is not under way, it waits its turn."""
    launching = record.state is State.STARTING and record.execution is None
    if (launching or record.state is State.RUNNING) and not holds_live_lease(record, now):
        return State.QUEUED
    return record.state


def submitted(record: ExportRecord, now: datetime) -> dict[str, Any]:
    """The answer to `POST /export`."""
    answer: dict[str, Any] = {
        "success": True,
        "job_id": record.job_id,
        "export_type": record.export_type.value,
        "export_id": record.export_id,
        "status": shown_state(record, now).value,
    }
    return answer | _result(record)


def status(record: ExportRecord, now: datetime, downloads: Downloads | None = None) -> dict[str, Any]:
    """The answer to `GET /exports/{export_id}`: everything a caller may know, no lease and no token.

    In a listing there are no `downloads`.
    """
    state = shown_state(record, now)
    waiting = state is State.QUEUED
    answer: dict[str, Any] = {
        "export_id": record.export_id,
        "job_id": record.job_id,
        "export_type": record.export_type.value,
        "quantization": record.quantization,
        "state": state.value,
        "stage": None if waiting else record.stage,
        "progress": 0.0 if waiting else record.progress,
        "attempt": record.attempt,
        "artifacts": [artifact.model_dump(mode="json") for artifact in record.artifacts],
        "summary": record.summary,
        "error": record.error.model_dump(mode="json") if record.error else None,
        "log_uri": record.log_uri,
        "created_at": record.created_at.isoformat(),
        "updated_at": record.updated_at.isoformat(),
    }
    if downloads is not None:
        answer["downloads"] = [asdict(file) for file in downloads.files]
        answer["downloads_expire_at"] = downloads.expire_at.isoformat()
        if downloads.left_out:
            answer["downloads_left_out"] = downloads.left_out
    return answer | _result(record)


def _result(record: ExportRecord) -> dict[str, str]:
    return {} if record.path is None else {RESULT_FIELD[record.export_type]: record.path}
