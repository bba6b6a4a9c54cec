"""Which base an adapter is merged into: the training job's own, or the 16-bit model that a quantized one is of."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dispatcher.artifacts import ArtifactStore, StoredFile, file_uri
from dispatcher.contract import TrainingJob
from dispatcher.errors import NotFound, SourceError, Unsupported
from exporter.byte_source import changed
from exporter.documents import parse_json_object
from exporter.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from exporter.quantized import twin_of
from exporter.sources import Base, Opener, QuantizedBase, TokenSource, local_path, open_base

DEQUANTIZED = "dequantized"
"""A `merge_base` that is no model: the quantized weights themselves, turned back into 16-bit ones. Not done yet."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def adapter_config(store: ArtifactStore, uri: str, files: list[StoredFile]) -> dict[str, Any]:
    """What an adapter's config says; nothing where it cannot be read, which `read_adapter` refuses by name.

    Raises:
        Unavailable: It was listed, and is gone (`source_changed`).
    """
    listed = next((file for file in files if file.name == CONFIG_NAME), None)
    if listed is None or listed.size > MAX_CONFIG_BYTES:
        return {}
    try:
        return parse_json_object(store.read(file_uri(uri, CONFIG_NAME), limit=MAX_CONFIG_BYTES))
    except NotFound as error:
        raise changed("the adapter") from error
    except ValueError:
        return {}


def base_for(job: TrainingJob, adapter: Mapping[str, Any], token: TokenSource, *, opener: Opener = open_base) -> Base:
    """Open the 16-bit model that a job's adapter is merged into.

    It is the job's `merge_base` where it has one; else its `base_model_id`, if that is not quantized; else the first of
    these that is there and is not quantized either:

    1. the 16-bit twin that the name of `base_model_id` speaks of;
    2. the adapter's `base_model_name_or_path`: itself if its name is not a quantized one's, else its twin;
    3. likewise what the quantized base's config.json names as its own source.

    Only ids on the hub count: what a path was made from, nobody can tell from the path. A `base_model_revision` pins
    the quantized repository and names no commit of another one, so a twin is taken as its main branch is now, unless
    the adapter, which names it, pins it; the manifest tells which commit that was. (Unsloth also drops the revision of
    a name that it maps to another.) To pin one, a job has `merge_base: {id}@{revision}`.

    Args:
        job: The training job.
        adapter: The adapter's config.
        token: As for `open_base`.
        opener: `open_base`, or what opens less of it.

    Returns:
        The base, with what was asked for and what the adapter was trained on where that is another model.

    Raises:
        Unsupported: `unsupported_merge_base_dequantized`.
        SourceError: `base_quantized` when no 16-bit model was found; else as `open_base`.
        Unavailable: As `open_base`.
    """
    if job.merge_base == DEQUANTIZED:
        raise Unsupported(
            f"training job {job.job_id} has merge_base {DEQUANTIZED!r}, which is not done yet: leave it out to merge "
            "into the 16-bit base.",
            code="unsupported_merge_base_dequantized",
        )
    if job.merge_base is not None:
        return _noted(opener(*_reference(job.merge_base), token), job, adapter)
    try:
        return _noted(opener(job.base_model_id, job.base_model_revision, token), job, adapter)
    except QuantizedBase as error:
        return _twin(job, adapter, error, token, opener)
    except SourceError as error:
        # The quantized copy may be gone from the hub, its twin is what counts; but a revision has to be one of it.
        gone = error.error_code == "base_missing" and job.base_model_revision is None
        if not gone or not _is_hub_id(job.base_model_id) or twin_of(job.base_model_id) is None:
            raise
        return _twin(job, adapter, error, token, opener)


def _twin(
    job: TrainingJob, adapter: Mapping[str, Any], reason: SourceError, token: TokenSource, opener: Opener
) -> Base:
    config = reason.config if isinstance(reason, QuantizedBase) else {}
    method = reason.method if isinstance(reason, QuantizedBase) else None
    tried = []
    for model_id, revision in _candidates(job, adapter, config):
        try:
            return _noted(opener(model_id, revision, token), job, adapter, method)
        except QuantizedBase:
            tried.append(f"{model_id} is quantized too")
        except SourceError as error:
            if error.error_code not in ("base_missing", "base_revision_missing"):
                raise
            found = "is not on the hub, or is private" if error.error_code == "base_missing" else f"has no {revision!r}"
            tried.append(f"{model_id} {found}")
    if not isinstance(reason, QuantizedBase):
        raise reason
    raise SourceError(
        f"{reason.message} Which that is could not be told: "
        f"{'; '.join(tried) or 'neither its name, nor its config, nor the adapter names one on the hub'}. "
        "Register that one as the base, or name it as merge_base in the training job.",
        code="base_quantized",
    ) from reason


def _candidates(
    job: TrainingJob, adapter: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """The ids and revisions to try, in the order of `base_for`."""
    pin = adapter.get("revision")
    named = (
        (job.base_model_id, None),
        (adapter.get("base_model_name_or_path"), pin if isinstance(pin, str) and pin else None),
        (config.get("_name_or_path"), None),
    )
    seen = {job.base_model_id.lower()}
    for name, revision in named:
        if not isinstance(name, str) or not _is_hub_id(name):
            continue
        twin = twin_of(name)
        model_id, revision = (name, revision) if twin is None else (twin, None)
        if model_id.lower() not in seen:
            seen.add(model_id.lower())
            yield model_id, revision


def _noted(base: Base, job: TrainingJob, adapter: Mapping[str, Any], method: str | None = None) -> Base:
    """The base with its history: what the job named, and what quantized model the adapter was trained on."""
    if base.model_id != job.base_model_id:
        facts = {"id": job.base_model_id, "revision": job.base_model_revision, "quantization": method}
        trained_on = {key: value for key, value in facts.items() if value is not None}
        return replace(base, requested=job.base_model_id, trained_on=trained_on)
    name = adapter.get("base_model_name_or_path")
    quantized = isinstance(name, str) and name != base.model_id and _is_hub_id(name) and twin_of(name) is not None
    return replace(base, trained_on={"id": name}) if quantized and isinstance(name, str) else base


def _reference(text: str) -> tuple[str, str | None]:
    """Id and revision of `{id}@{revision}`; a path or URI has none."""
    if local_path(text) is not None or "://" in text:
        return text, None
    model_id, _, revision = text.partition("@")
    return model_id, revision or None


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and local_path(name) is None
