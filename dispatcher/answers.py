"""What travels in HTTP bodies, and in what the CLI prints: the request as read, a record as shown, a refusal.

The models are also what the OpenAPI document is made of (`dispatcher.openapi`), so it cannot say anything else.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PlainSerializer, StringConstraints, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from dispatcher.contract import (
    EXPORT_ID_FORM,
    JOB_ID_FORM,
    RESULT_FIELD,
    Artifact,
    ExportRecord,
    ExportRequest,
    ExportType,
    Failure,
    Frozen,
    State,
)
from dispatcher.downloads import Downloads
from dispatcher.errors import InvalidRequest
from dispatcher.lifecycle import holds_live_lease
from dispatcher.logs import clean

Code = Annotated[str, Field(json_schema_extra={"pattern": "^[a-z][a-z0-9_]*$"})]
"""Stable, and what programs compare."""


def _is_none(value: object) -> bool:
    return value is None


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _left_out(description: str) -> Any:
    """A field that is not there, rather than null, where there is nothing to say."""
    return Field(default=None, exclude_if=_is_none, description=description, json_schema_extra=_without_default)


Text = str | SkipJsonSchema[None]
Moment = Annotated[
    datetime,
    PlainSerializer(datetime.isoformat, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}, mode="serialization"),
]


class Results(Frozen):
    """Where the result lies, under the name that the export's type gives it; there once it is completed."""

    adapter_path: Text = _left_out("URI or path of the adapter's directory.")
    merged_path: Text = _left_out("URI of the merged model's directory.")
    gguf_path: Text = _left_out("URI of the GGUF file.")


class Submitted(Results):
    """The answer to `POST /export`."""

    success: Literal[True]
    job_id: Annotated[str, Field(json_schema_extra=JOB_ID_FORM)]
    export_type: ExportType
    export_id: Annotated[str, Field(json_schema_extra=EXPORT_ID_FORM)]
    status: State


class DownloadFile(Frozen):
    """A file of a finished export."""

    name: Annotated[str, Field(description="Path relative to the artifact.")]
    bytes: Annotated[int, Field(ge=0)]
    url: Annotated[str | None, Field(description="Null where none can be signed, or could in time.")]


class ExportStatus(Results):
    """Everything a caller may know of an export: no lease and no token."""

    export_id: Annotated[str, Field(json_schema_extra=EXPORT_ID_FORM)]
    job_id: Annotated[str, Field(json_schema_extra=JOB_ID_FORM)]
    export_type: ExportType
    quantization: str | None
    state: State
    stage: str | None
    progress: Annotated[float, Field(ge=0, le=1)]
    attempt: Annotated[int, Field(ge=0)]
    artifacts: tuple[Artifact, ...]
    summary: Annotated[dict[str, Any], Field(description="What the manifest says in short.")]
    error: Failure | None
    log_uri: str | None
    created_at: Moment
    updated_at: Moment
    downloads: tuple[DownloadFile, ...] | SkipJsonSchema[None] = _left_out(
        "The files of a completed export; not in a listing, and not where they cannot be told now."
    )
    downloads_expire_at: Moment | SkipJsonSchema[None] = _left_out("When their URLs are good no longer.")
    downloads_left_out: int | SkipJsonSchema[None] = _left_out("How many more files there are than are offered.")


class ExportPage(Frozen):
    """A page of the caller's own exports, by id."""

    exports: tuple[ExportStatus, ...]
    next: Annotated[
        Annotated[str, Field(json_schema_extra=EXPORT_ID_FORM)] | None,
        Field(description="What to give as `after` for the next page; null on the last."),
    ]


class Health(Frozen):
    """The answer to `GET /health`."""

    status: Literal["healthy"] = "healthy"
    service: Literal["export"] = "export"


class Problem(Frozen):
    """A refusal (RFC 9457, https://www.rfc-editor.org/rfc/rfc9457)."""

    type: Literal["about:blank"]
    title: Annotated[str, StringConstraints(min_length=1)]
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(description="For people: what was found, what was expected, what to do.")]
    code: Code
    instance: Text = _left_out("The id under which a fault of ours is logged.")


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
    """The answer to `POST /export`: a `Submitted`."""
    return _document(
        Submitted(
            success=True,
            job_id=record.job_id,
            export_type=record.export_type,
            export_id=record.export_id,
            status=shown_state(record, now),
            **_result(record),
        )
    )


def status(record: ExportRecord, now: datetime, downloads: Downloads | None = None) -> dict[str, Any]:
    """The answer to `GET /exports/{export_id}`: an `ExportStatus`. In a listing there are no `downloads`."""
    state = shown_state(record, now)
    waiting = state is State.QUEUED
    fetchable: dict[str, Any] = {}
    if downloads is not None:
        files = tuple(DownloadFile(name=file.name, bytes=file.bytes, url=file.url) for file in downloads.files)
        fetchable = {"downloads": files, "downloads_expire_at": downloads.expire_at}
        fetchable |= {"downloads_left_out": downloads.left_out or None}
    return _document(
        ExportStatus(
            export_id=record.export_id,
            job_id=record.job_id,
            export_type=record.export_type,
            quantization=record.quantization,
            state=state,
            stage=None if waiting else record.stage,
            progress=0.0 if waiting else record.progress,
            attempt=record.attempt,
            artifacts=record.artifacts,
            summary=record.summary,
            error=record.error,
            log_uri=record.log_uri,
            created_at=record.created_at,
            updated_at=record.updated_at,
            **fetchable,
            **_result(record),
        )
    )


def page(records: list[ExportRecord], now: datetime, *, following: str | None) -> dict[str, Any]:
    """The answer to `GET /exports`: an `ExportPage`; `following` is the id that the next page begins after."""
    return {"exports": [status(record, now) for record in records], "next": following}


def problem(document: dict[str, Any]) -> dict[str, Any]:
    """A `Problem` whose texts are clean, of what `ExportError.problem` says."""
    return _document(Problem.model_validate({**document, "detail": clean(str(document["detail"]))}))


def _document(answer: Frozen) -> dict[str, Any]:
    return answer.model_dump(mode="json")


def _result(record: ExportRecord) -> dict[str, Any]:
    return {} if record.path is None else {RESULT_FIELD[record.export_type]: record.path}
