"""Identities, messages and documents: what is accepted, what is refused, and that codecs round-trip."""

import json
from datetime import UTC, datetime
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.contract import (
    QUANTIZATIONS,
    Artifact,
    ExportRecord,
    ExportRequest,
    ExportType,
    Failure,
    JobMessage,
    Lease,
    State,
    TrainingJob,
    export_id_of,
    fingerprint_of,
    is_export_id,
    is_job_id,
)

BAD_JOB_IDS = [
    *("", "--force", "a/b", "..", "a..b", "a,b", "x" * 201, "x" * 300, "-a", ".a", "_a", "a b", "a\n", "a\0"),
    *("é", "a\u202eb", "a%2fb", "$(id)", "a;b", "a'b"),
]

job_ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True).filter(is_job_id)
times = st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
kinds = st.sampled_from(ExportType)


@st.composite
def records(draw: st.DrawFn) -> ExportRecord:
    """Any record that can be stored, in any state."""
    job_id, kind = draw(job_ids), draw(kinds)
    quantization = draw(st.sampled_from(QUANTIZATIONS)) if kind is ExportType.GGUF else None
    artifact = st.builds(
        Artifact,
        kind=kinds,
        uri=texts,
        version=texts,
        bytes=st.integers(0, 2**50),
        files=st.integers(0, 99),
        manifest=st.none() | texts,
    )
    return ExportRecord(
        export_id=export_id_of(job_id, kind, quantization),
        job_id=job_id,
        user_id=draw(texts),
        export_type=kind,
        quantization=quantization,
        state=draw(st.sampled_from(State)),
        revision=draw(st.integers(0, 2**40)),
        stage=draw(st.none() | texts),
        progress=draw(st.floats(0, 1)),
        attempt=draw(st.integers(0, 9)),
        launches=draw(st.integers(0, 9)),
        lease=draw(st.none() | st.builds(Lease, lease_id=texts, owner=texts, expires_at=times)),
        adapter_fingerprint=draw(texts),
        artifacts=draw(st.lists(artifact, max_size=2).map(tuple)),
        summary=draw(
            st.dictionaries(texts, st.integers() | texts | st.floats(allow_nan=False, allow_infinity=False), max_size=3)
        ),
        error=draw(st.none() | st.builds(Failure, code=texts, message=texts, retryable=st.booleans())),
        token_ref=draw(st.none() | texts),
        execution=draw(st.none() | texts),
        log_uri=draw(st.none() | texts),
        force_nonce=draw(st.none() | texts),
        version=draw(st.none() | texts),
        created_at=draw(times),
        updated_at=draw(times),
        queued_at=draw(st.none() | times),
        published_at=draw(st.none() | times),
    )


@given(records())
def test_a_record_survives_its_encoding(record: ExportRecord) -> None:
    """What is read back is what was written."""
    assert ExportRecord.model_validate_json(record.model_dump_json()) == record


@given(records())
def test_what_a_newer_release_has_added_to_a_record_is_passed_over(record: ExportRecord) -> None:
    """Two releases read the same records while one follows the other, and after a rollback."""
    document = json.loads(record.model_dump_json())
    for part in (document, document["lease"], document["error"], *document["artifacts"]):
        if part is not None:
            part["of_a_newer_release"] = "x"
    assert ExportRecord.model_validate_json(json.dumps(document)) == record


@given(records())
def test_a_record_of_another_format_is_not_guessed_at(record: ExportRecord) -> None:
    """Its fields may mean something else."""
    with pytest.raises(pydantic.ValidationError):
        ExportRecord.model_validate_json(json.dumps({**json.loads(record.model_dump_json()), "schema_version": 2}))


@given(job_ids, kinds, st.sampled_from(QUANTIZATIONS))
def test_a_message_survives_its_encoding_and_names_its_own_job(
    job_id: str, kind: ExportType, quantization: str
) -> None:
    """Every export id that can be made is one, and belongs to its job alone."""
    export_id = export_id_of(job_id, kind, quantization if kind is ExportType.GGUF else None)
    assert is_export_id(export_id)
    message = JobMessage(job_id=job_id, export_id=export_id)
    assert JobMessage.model_validate_json(message.model_dump_json()) == message


@given(job_ids, job_ids, kinds, kinds)
def test_two_jobs_never_share_an_export_id(one: str, other: str, kind: ExportType, other_kind: ExportType) -> None:
    """The id alone tells job and type, although job ids may hold dots."""
    same = (one, kind) == (other, other_kind)
    assert (export_id_of(one, kind, None) == export_id_of(other, other_kind, None)) is same


@pytest.mark.parametrize("job_id", BAD_JOB_IDS)
def test_a_job_id_of_another_form_is_refused_everywhere(job_id: str) -> None:
    """In a request, in a message, and as part of an export id."""
    assert not is_job_id(job_id)
    assert not is_export_id(f"{job_id}.merged")
    with pytest.raises(pydantic.ValidationError, match="job_id"):
        ExportRequest.model_validate({"job_id": job_id, "export_type": "merged"})
    with pytest.raises(pydantic.ValidationError):
        JobMessage(job_id=job_id, export_id=f"{job_id}.merged")


@pytest.mark.parametrize("export_id", ["a", "a.gguf", "a.gguf.q9", "a.xq8_0", "a.gguf.xq8_0", "a.merged.", ".merged"])
def test_what_is_no_export_id_is_told_apart(export_id: str) -> None:
    """Only `{job}.adapter`, `{job}.merged` and `{job}.gguf.{quantization}`."""
    assert not is_export_id(export_id)


def test_a_message_cannot_name_another_jobs_export() -> None:
    """`a.merged.adapter` is an export of job `a.merged`, not of `a`."""
    with pytest.raises(pydantic.ValidationError):
        JobMessage(job_id="a", export_id="a.merged.adapter")


@given(st.lists(st.tuples(texts, st.integers(0, 2**40), texts), max_size=5, unique_by=lambda file: file[0]))
def test_a_fingerprint_does_not_depend_on_the_order_of_a_listing(files: list[tuple[str, int, str]]) -> None:
    """It is over the sorted files."""
    assert fingerprint_of(files) == fingerprint_of(files[::-1])


@pytest.mark.parametrize(
    ("document", "provider", "adapter"),
    [
        ({"base_model_id": "google/gemma-3-1b-it", "adapter_path": "/old"}, "huggingface", "/old"),
        ({"base_model_id": "unsloth/gemma-3-1b-it"}, "unsloth", None),
        ({"base_model_id": "unsloth/x", "provider": "huggingface"}, "huggingface", None),
        (
            {"base_model_id": "b", "adapter_path": "/old", "artifacts": {"raw": {"adapter": "/new"}}},
            "huggingface",
            "/new",
        ),
        ({"base_model_id": "b", "artifacts": None, "adapter_path": "/old"}, "huggingface", "/old"),
    ],
)
def test_a_training_job_is_read_old_and_new(document: dict[str, Any], provider: str, adapter: str | None) -> None:
    """The newer place of the adapter wins, an `unsloth/` base means unsloth, and unknown fields are ignored."""
    job = TrainingJob.from_document("job", {"user_id": "u", "status": "completed", "extra": 1, **document})
    assert (job.provider, job.adapter_path) == (provider, adapter)


def test_a_token_does_not_show_in_a_request() -> None:
    """Neither in its text nor in its JSON."""
    request = ExportRequest.model_validate({"job_id": "a", "export_type": "merged", "hf_token": "hf_secret"})
    assert "hf_secret" not in repr(request) + request.model_dump_json()
