"""What the parts say to each other: requests, records, messages, and the identity of an export.

Everything here is frozen; a change is a new copy. How a record may change is `dispatcher.lifecycle`.
"""

import hashlib
import re
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    field_validator,
    model_validator,
)

from dispatcher.limits import MAX_MESSAGE_LENGTH, MAX_NAME_LENGTH, MAX_PATH_LENGTH, small_summary
from dispatcher.logs import clean

JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
"""A job id becomes a file name, a document id and a command argument; `..` is refused besides."""

QUANTIZATIONS = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs", "q4_0", "q5_0"),
)
DEFAULT_QUANTIZATION = "q8_0"
HEADER_VALUE_PATTERN = r"^[!-~]{1,512}$"
"""What a header can hold, and so the most that a Hugging Face token can be."""
NEED_IMPORTANCE = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "q2_k_s"), "q2_k"),
    "iq3_xxs": "q3_k_s",
}
"""What llama.cpp makes with an importance matrix alone, and what to ask for instead. Source: `tensor_requires_imatrix`
in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp"""
SCHEMA_VERSION: Literal[1] = 1


_KINDS = rf"(?:adapter|merged|gguf\.(?:{'|'.join(QUANTIZATIONS)}))"
JOB_ID_FORM: dict[str, Any] = {
    "pattern": r"^(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,199}$",
    "minLength": 1,
    "maxLength": 200,
}
"""`is_job_id` in JSON Schema's words."""
EXPORT_ID_FORM: dict[str, Any] = {
    "pattern": rf"^(?!.*\.\.(?!{_KINDS}$))[A-Za-z0-9][A-Za-z0-9._-]{{0,199}}\.{_KINDS}$",
    "minLength": len("x.merged"),
    "maxLength": 200 + max(len(f".gguf.{quantization}") for quantization in QUANTIZATIONS),
}
"""`is_export_id` in JSON Schema's words: a job id may end with a dot, and a type follows after another."""


class ExportType(StrEnum):
    ADAPTER = "adapter"
    MERGED = "merged"
    GGUF = "gguf"


class State(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = frozenset({State.QUEUED, State.STARTING, State.RUNNING})
RESULT_FIELD = {
    ExportType.ADAPTER: "adapter_path",
    ExportType.MERGED: "merged_path",
    ExportType.GGUF: "gguf_path",
}
"""The field of the answer, and of the training job, that holds an export's result."""


def is_job_id(text: str) -> bool:
    """Whether `text` has the form of a job id: `JOB_ID_PATTERN` without `..`."""
    return re.fullmatch(JOB_ID_PATTERN, text) is not None and ".." not in text and not text.endswith("\n")


def is_token(text: str) -> bool:
    """Whether `text` can be a Hugging Face token: what a header can hold."""
    return re.fullmatch(HEADER_VALUE_PATTERN, text) is not None and not text.endswith("\n")


def is_export_id(text: str) -> bool:
    """Whether `text` is a job id followed by a type this contract knows."""
    job_id, dot, kind = text.rpartition(".")
    if dot and kind in (ExportType.ADAPTER, ExportType.MERGED):
        return is_job_id(job_id)
    quantization = kind
    job_id, dot, kind = job_id.rpartition(".")
    return bool(dot) and kind == ExportType.GGUF and quantization in QUANTIZATIONS and is_job_id(job_id)


def export_id_of(job_id: str, export_type: ExportType, quantization: str | None) -> str:
    """The deterministic id of an export: `{job_id}.adapter`, `.merged`, or `.gguf.{quantization}`."""
    if export_type is ExportType.GGUF:
        return f"{job_id}.gguf.{quantization or DEFAULT_QUANTIZATION}"
    return f"{job_id}.{export_type}"


def fingerprint_of(files: list[tuple[str, int, str]]) -> str:
    """The adapter's fingerprint: sha256 over its sorted (name, size in bytes, crc32c in base64)."""
    lines = "".join(f"{name}\t{size}\t{crc32c}\n" for name, size, crc32c in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


class Frozen(BaseModel):
    """Base of what we write ourselves: immutable, and strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Kept(Frozen):
    """Base of what is stored while a deployment is upgraded or rolled back.

    What another release has added is passed over; one that means something else by a field changes `schema_version`.
    """

    model_config = ConfigDict(extra="ignore")


JobId = Annotated[str, StringConstraints(pattern=JOB_ID_PATTERN)]


Name = Annotated[str, StringConstraints(max_length=MAX_NAME_LENGTH)]
Place = Annotated[str, StringConstraints(max_length=MAX_PATH_LENGTH)]


class ExportRequest(Frozen):
    """The body of `POST /export`."""

    job_id: Annotated[str, Field(strict=True, json_schema_extra=JOB_ID_FORM)]
    export_type: ExportType
    hf_token: Annotated[SecretStr, Field(json_schema_extra={"pattern": HEADER_VALUE_PATTERN})] | None = None
    quantization: Literal[QUANTIZATIONS] | None = None  # type: ignore[valid-type]  # one list, used as type and data

    @field_validator("quantization", mode="before")
    @classmethod
    def _without_importance(cls, value: object) -> object:
        instead = NEED_IMPORTANCE.get(value) if isinstance(value, str) else None
        if instead is not None:
            raise ValueError(f"{value} needs an importance matrix, of which none is made here: ask for {instead}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not is_job_id(self.job_id):
            raise ValueError(f"job_id must match {JOB_ID_PATTERN} and hold no '..'")
        if self.quantization is not None and self.export_type is not ExportType.GGUF:
            raise ValueError(f"quantization goes with export_type gguf only, not {self.export_type.value}")
        if self.hf_token is not None and not is_token(self.hf_token.get_secret_value()):
            raise ValueError("hf_token must be 1 to 512 printable characters without spaces")
        return self

    @property
    def export_id(self) -> str:
        return export_id_of(self.job_id, self.export_type, self.quantization)


class TrainingJob(BaseModel):
    """What we read of `training_jobs/{job_id}`; the document belongs to the training service."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    user_id: Name
    status: Name
    base_model_id: Place
    base_model_revision: Name | None = None
    merge_base: Place | None = None
    """The 16-bit model to merge into where `base_model_id` is a quantized one: a hub id, optionally `@revision`, or a
    directory. The platform need not say it where names tell (see `exporter.bases`)."""
    provider: Literal["unsloth", "huggingface"] = "huggingface"
    adapter_path: Place | None = None

    @classmethod
    def from_document(cls, job_id: str, document: dict[str, Any]) -> Self:
        """Read a document of the training service.

        The adapter lies at `artifacts.raw.adapter` or, in older documents, at `adapter_path`; without a
        `provider`, an `unsloth/` prefix of the base model means unsloth.

        Raises:
            pydantic.ValidationError: A field that an export needs is missing or of the wrong type.
        """
        fields = dict(document, job_id=job_id)
        raw = document.get("artifacts", {})
        raw = raw.get("raw", {}) if isinstance(raw, dict) else {}
        adapter = raw.get("adapter") if isinstance(raw, dict) else None
        fields["adapter_path"] = adapter or document.get("adapter_path")
        if fields.get("provider") is None:
            unsloth = str(document.get("base_model_id", "")).startswith("unsloth/")
            fields["provider"] = "unsloth" if unsloth else "huggingface"
        return cls.model_validate(fields)


class Lease(Kept):
    """The right to work on an export, until it expires."""

    lease_id: str
    owner: str
    """The execution that holds it; an execution's next attempt is the same owner."""
    expires_at: datetime


class Artifact(Kept):
    """One published result."""

    kind: ExportType
    uri: str
    version: str
    bytes: int
    files: int
    manifest: str | None
    """The URI of its `export.json`, written last; None for an adapter, which is served as it lies."""
    file: str | None = None
    """The URI of the one file that is the model; None where a whole directory is."""

    @property
    def path(self) -> str:
        """What a caller is told: the file, or the directory."""
        return self.file or self.uri


class Failure(Kept):
    """Why an export failed, as a caller may see it."""

    code: str
    message: Annotated[str, AfterValidator(partial(clean, limit=MAX_MESSAGE_LENGTH))]
    """What a file, a library or a peer said may be in it, so it is cut and escaped whoever writes it."""
    retryable: bool


class ExportRecord(Kept):
    """`exports/{export_id}`: everything known about one export. Changed by compare-and-set on `revision`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    export_id: str
    job_id: str
    user_id: str
    export_type: ExportType
    quantization: str | None = None
    state: State
    revision: int = 0
    stage: str | None = None
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    attempt: int = 0
    launches: int = 0
    """Executions started in a row of which none has claimed it."""
    lease: Lease | None = None
    adapter_fingerprint: str
    artifacts: tuple[Artifact, ...] = ()
    summary: Annotated[dict[str, Any], AfterValidator(small_summary)] = {}
    """What the manifest says in short: engine, counts of tensors merged and copied, seconds, peak memory."""
    error: Failure | None = None
    token_ref: str | None = None
    """Where the token store keeps this export's Hugging Face token; never the token."""
    execution: str | None = None
    log_uri: str | None = None
    force_nonce: str | None = None
    version: str | None = None
    """Which version the tasks that hold it are making, where there are several."""
    created_at: datetime
    updated_at: datetime
    queued_at: datetime | None = None
    """Since when it waits, or waited last, for an execution to be started; None in records of before there was this."""
    published_at: datetime | None = None
    publications: int = 0
    """Messages sent in a row of which none was delivered."""
    uncollected_since: datetime | None = None
    """When it ended, until what earlier versions and attempts left was removed (`dispatcher.collector`)."""

    @property
    def path(self) -> str | None:
        """The URI of the result, once there is one."""
        if self.state is not State.COMPLETED or not self.artifacts:
            return None
        return self.artifacts[0].path


class JobMessage(Frozen):
    """What travels through the queue: ids only, never a secret, never the work itself."""

    schema_version: Literal[1] = SCHEMA_VERSION
    job_id: JobId
    export_id: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # Job ids may hold dots: `a.merged.adapter` is an export of job `a.merged`, not of `a`.
        ggufs = {export_id_of(self.job_id, ExportType.GGUF, quantization) for quantization in QUANTIZATIONS}
        others = {export_id_of(self.job_id, kind, None) for kind in (ExportType.ADAPTER, ExportType.MERGED)}
        if not is_job_id(self.job_id) or self.export_id not in ggufs | others:
            raise ValueError(f"export_id {self.export_id!r} is not an export of job {self.job_id!r}")
        return self
