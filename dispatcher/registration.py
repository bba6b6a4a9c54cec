"""Writes down a completed training job, for adapters that no training service has recorded."""

import secrets
from typing import Any

from dispatcher.artifacts import ArtifactStore, path_of
from dispatcher.contract import JOB_ID_PATTERN, TrainingJob, is_job_id
from dispatcher.errors import Conflict, InvalidRequest, NotFound
from dispatcher.records import RecordStore


def register(
    records: RecordStore,
    artifacts: ArtifactStore,
    *,
    base: str,
    adapter: str,
    user: str,
    job_id: str | None = None,
    provider: str | None = None,
) -> str:
    """Create `training_jobs/{job_id}` as completed; returns the job id, a new one when none is given.

    Args:
        base: A hub id (`google/gemma-3-1b-it`), optionally `@revision`, or a directory.
        adapter: A directory or URI with the adapter's files.

    Raises:
        InvalidRequest: The job id has the wrong form, or no such provider is known.
        NotFound: Nothing lies at `adapter` (`adapter_gone`).
        Conflict: There is such a job already (`job_exists`); it stays as it is.
    """
    job_id = f"job-{secrets.token_hex(6)}" if job_id is None else job_id
    if not is_job_id(job_id):
        raise InvalidRequest(f"job id {job_id!r}: expected {JOB_ID_PATTERN} without '..'", code="job_id_invalid")
    if provider not in (None, "unsloth", "huggingface"):
        raise InvalidRequest(f"provider {provider!r}: expected unsloth or huggingface")
    place = adapter if "://" in adapter else str(path_of(adapter))
    if not artifacts.list(place, checksums=False):
        raise NotFound(f"there is no adapter at {place}: expected a directory with its files", code="adapter_gone")
    document: dict[str, Any] = {
        "user_id": user,
        "status": "completed",
        "adapter_path": place,
        "artifacts": {"raw": {"adapter": place}},
        **_base(base),
    }
    if provider:
        document["provider"] = provider
    TrainingJob.from_document(job_id, document)
    if not records.put_job(job_id, document):
        raise Conflict(f"there is a training job {job_id} already; it was left as it is", code="job_exists")
    return job_id


def _base(base: str) -> dict[str, str]:
    if "://" in base:
        return {"base_model_id": base}
    if path_of(base).is_dir():
        return {"base_model_id": str(path_of(base))}
    model, _, revision = base.partition("@")
    return {"base_model_id": model} | ({"base_model_revision": revision} if revision else {})
