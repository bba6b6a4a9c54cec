"""The OpenAPI document is valid, says what the contract says, and no answer contradicts it."""

import json
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import jsonschema_rs
import pydantic
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator

from dispatcher.cli import main
from dispatcher.contract import (
    EXPORT_ID_FORM,
    JOB_ID_FORM,
    QUANTIZATIONS,
    ExportRequest,
    is_export_id,
    is_job_id,
)
from dispatcher.openapi import document
from tests.dispatcher.conformance import run
from tests.dispatcher.server import served
from tests.dispatcher.test_contract import BAD_JOB_IDS
from tests.dispatcher.world import World

KINDS = (".adapter", ".merged", ".gguf", ".gguf.q8_0", ".gguf.q9_9", "..merged", ".gguf..q8_0")


def has_form(text: str, form: dict[str, Any]) -> bool:
    """Whether a text is what its schema in the document describes."""
    return jsonschema_rs.validator_for({"type": "string", **form}).is_valid(text)


def test_the_document_is_valid_openapi() -> None:
    """By the specification's own schema, and with every reference leading somewhere."""
    assert list(OpenAPIV31SpecValidator(document()).iter_errors()) == []


def test_the_command_prints_the_document() -> None:
    """As JSON on stdout, with nothing of this machine needed."""
    assert json.loads(CliRunner().invoke(main, ["openapi"]).stdout) == document()


def test_every_answer_of_the_contract_is_in_the_document() -> None:
    """Each status somewhere, and those of a refusal as problem documents."""
    made = document()
    operations = [operation for path in made["paths"].values() for operation in path.values()]
    statuses = {int(status) for operation in operations for status in operation["responses"]}
    assert statuses == {200, 202, 400, 401, 403, 404, 409, 413, 429, 500, 503}
    refusals = made["components"]["responses"]
    assert {int(status) for status in refusals} == {status for status in statuses if status >= 400} | {405}
    assert all(list(refusal["content"]) == ["application/problem+json"] for refusal in refusals.values())


def test_each_example_is_a_request() -> None:
    """Whoever copies one gets what it says."""
    body = document()["paths"]["/export"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        assert ExportRequest.model_validate(example["value"])


@pytest.mark.parametrize("job_id", [*BAD_JOB_IDS, "a", "a.", "a.b", "x" * 200, "x" * 201, "a\n"])
def test_the_form_of_a_job_id_is_the_contracts(job_id: str) -> None:
    """For every id that is nearly one."""
    assert has_form(job_id, JOB_ID_FORM) == is_job_id(job_id)


@given(st.text("aZ0._-/\n", max_size=12), st.sampled_from([*KINDS, ""]), st.sampled_from(["", "\n", "x"]))
def test_the_form_of_an_id_is_the_contracts_for_any_text(job_id: str, kind: str, rest: str) -> None:
    """Job ids may hold dots, even end with one, and so may what follows."""
    text = f"{job_id}{kind}{rest}"
    assert has_form(text, JOB_ID_FORM) == is_job_id(text)
    assert has_form(text, EXPORT_ID_FORM) == is_export_id(text)


@pytest.mark.parametrize("length", [199, 200, 201])
def test_the_form_of_an_export_id_bounds_its_job_id(length: int) -> None:
    """And not only the whole."""
    for kind in KINDS:
        assert has_form("x" * length + kind, EXPORT_ID_FORM) == is_export_id("x" * length + kind)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "job_id": st.sampled_from(["job", "a..b", "", 7, None]),
            "export_type": st.sampled_from(["adapter", "merged", "gguf", "GGUF", None]),
            "quantization": st.sampled_from([None, *QUANTIZATIONS[:3], "iq1_s", 8]),
            "hf_token": st.sampled_from([None, "hf_x", "", "a b", "x" * 513, 1]),
            "colour": st.just("red"),
        },
    )
)
def test_the_body_in_the_document_is_what_is_accepted(body: dict[str, Any]) -> None:
    """No more and no less, also where two fields have to go together."""
    made = document()
    schema = {"$ref": "#/components/schemas/ExportRequest", "components": made["components"]}
    try:
        ExportRequest.model_validate(body)
        accepted = True
    except pydantic.ValidationError:
        accepted = False
    assert jsonschema_rs.validator_for(schema).is_valid(body) == accepted


def test_no_answer_contradicts_the_document(tmp_path: Path) -> None:
    """Asked by schemathesis of exports in every state; no answer is a fault of ours, and there is one of every kind."""
    found = run(tmp_path, examples=10, seconds=20)
    assert (found.contradictions, found.errors) == ([], []), found.report
    assert found.faults == 0
    assert found.requests > 200
    assert found.statuses.keys() >= {200, 202, 400, 401, 403, 404, 405, 409}


def test_refusals_that_are_hard_to_provoke_are_as_the_document_says(tmp_path: Path) -> None:
    """413, 429, 500 and 503: a body too large, a user with too many exports, a damaged record, a queue that is down."""
    world = World(tmp_path, max_unfinished_per_user=1)
    made = document()
    for job_id in ("first", "second"):
        world.job(job_id)
    with served(world) as http:
        first = {"job_id": "first", "export_type": "merged"}
        world.queue.down = True
        answers = [http.post("/export", json=first)]
        answers.append(http.post("/export", json={**first, "job_id": "second"}))
        answers.append(http.post("/export", content=b" " * 65_537))
        other = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
        other.execute("UPDATE exports SET document = '{}'")
        other.close()
        answers.append(http.get("/exports/first.merged"))
    assert [answer.status_code for answer in answers] == [503, 429, 413, 500]
    schema = {"$ref": "#/components/schemas/Problem", "components": made["components"]}
    for answer in answers:
        jsonschema_rs.validator_for(schema).validate(answer.json())
        headers = made["components"]["responses"][str(answer.status_code)].get("headers", {})
        for name, header in headers.items():
            assert has_form(answer.headers[name], header["schema"])
    assert "Retry-After" in answers[0].headers
    world.close()


def test_no_pattern_in_the_document_is_slow() -> None:
    """A gateway or a client may match them against anything."""
    patterns = re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', json.dumps(document()))
    start = time.perf_counter()
    for pattern in {json.loads(text) for text in patterns}:
        for text in ("a." * 50_000, "a" * 100_000, "." * 100_000, "gguf." * 20_000):
            assert not re.search(pattern, f"{text}\0")
    assert len(patterns) > 3
    assert time.perf_counter() - start < 2
