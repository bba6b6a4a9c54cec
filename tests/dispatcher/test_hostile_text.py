"""What others say, in requests, documents and errors, reaches an answer or a log cut and escaped, or not at all."""

import base64
import io
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher import logs
from dispatcher.contract import ExportRecord, Failure, TrainingJob
from dispatcher.errors import SourceError
from dispatcher.identity import USERINFO_HEADER
from dispatcher.limits import MAX_LISTED_FILES, MAX_MESSAGE_LENGTH, MAX_SUMMARY_BYTES, bounded_listing
from dispatcher.logs import clean
from tests.dispatcher.server import served
from tests.dispatcher.world import World

LINES = "\n\r\x0b\x0c\x1c\x85\u2028\u2029"
TERMINAL = "\0\x07\x08\x1b\x7f\x9b"
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
UNSEEN = "\xad\u200b\u200d\u2060\ufeff\U000e0041"
SURROGATES = "\ud800\udfff"
RISKY = LINES + TERMINAL + BIDI + UNSEEN + SURROGATES
FORGED = '\n{"severity": "ERROR", "message": "forged"}\r\u2028\x1b[2J\u202egnp.exe\u2066'


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """All that is logged, through the handler of a deployment."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    stream = io.StringIO()
    logs.configure(stream, {"service": "test"})
    yield stream.getvalue
    root.handlers[:] = before
    root.setLevel(level)


def assert_harmless(text: str) -> None:
    """One JSON object a line, with nothing risky in any of its texts but the line breaks of a traceback."""
    assert text.isascii()
    for line in text.splitlines():
        for name, value in json.loads(line).items():
            allowed = "\n" if name == "exception" else ""
            assert not set(str(value)) & (set(RISKY) - set(allowed)), line


@pytest.mark.parametrize("character", list(RISKY))
def test_a_risky_character_is_told_by_its_number(character: str) -> None:
    """So that whoever reads the line sees that it was there; a traceback keeps its lines."""
    number = f"{ord(character):x}"
    told = clean(f"a{character}b")
    assert told.startswith("a\\")
    assert number in told or character in "\n\r"
    assert character not in clean(f"a{character}b", lines=True) or character == "\n"


@given(st.text(st.one_of(st.sampled_from(RISKY), st.characters())), st.integers(40, 200))
def test_clean_text_is_short_and_stays_as_it_is(text: str, limit: int) -> None:
    """A record is cleaned whenever it is read."""
    told = clean(text, limit=limit)
    assert len(told) <= limit
    assert not set(told) & set(RISKY)
    assert clean(told, limit=limit) == told


@pytest.mark.parametrize("part", ["x", "eyJ", "hf_", "\x1b", "\u202e", "a b ", "\ud800", "bearer "])
def test_a_mebibyte_is_cleaned_in_no_time(part: str) -> None:
    """Whoever sends one holds up nobody."""
    start = time.perf_counter()
    assert len(clean(part * ((1 << 20) // len(part)))) <= logs.MAX_TEXT
    assert time.perf_counter() - start < 2


def test_no_half_of_a_token_is_left_where_a_long_text_is_cut() -> None:
    """Though the search for tokens ends in the middle of it, and what stood before it shrinks."""
    secret = "hf_" + "q" * 30
    for shift in range(0, 40, 3):
        text = "hf_aaaaaa" + "b" * 100_000 + " " + "c" * (logs.MAX_READ - 100_040 + shift) + secret
        assert "qq" not in clean(text)
        assert "qq" not in clean(f"hf_{'a' * (logs.MAX_READ - 20 - shift)} {secret}" + " z" * 100)


def test_a_request_forges_no_log_line_and_no_answer(world: World, logged: Callable[[], str]) -> None:
    """By its path, query, method's route, body, ids or headers."""
    world.job()
    with served(world) as http:
        for text in (FORGED, *RISKY, "%", "x" * 15_000):
            raw = quote(text, errors="surrogatepass")
            body = json.dumps({"job_id": text, "export_type": text, text: text})
            answers = [
                http.get(f"/{raw}"),
                http.get(f"/exports/{raw}"),
                http.post(f"/exports/{raw}/cancel"),
                http.request("PUT", f"/exports/{raw}"),
                http.get("/exports", params=f"job_id={raw}&after={raw}"),
                http.post("/export", content=body.encode(errors="surrogatepass")),
                http.get("/exports", headers={"traceparent": raw}),
            ]
            assert [answer.status_code for answer in answers] == [404, 404, 404, *http_405(text), 400, 400, 200]
            for answer in answers:
                assert answer.headers["Content-Type"] in ("application/json", "application/problem+json")
                assert_harmless(answer.text)
                assert len(answer.content) < 5_000
    assert_harmless(logged())
    assert not any(json.loads(line)["message"] == "forged" for line in logged().splitlines())


def http_405(text: str) -> list[int]:
    """A line break is none of the characters that Flask's routes take, so there it is no route at all."""
    return [404 if "\n" in text else 405]


def vouched(claims: bytes) -> str:
    return base64.urlsafe_b64encode(claims).decode()


@pytest.mark.parametrize(
    "header",
    [
        "x" * 8_000,
        "=" * 8_000,
        "\x80\xff",
        vouched(b"[" * 5_000),
        vouched(b'{"a":' * 1_000),
        vouched(b'{"sub": ' + b"9" * 5_000 + b"}"),
        vouched(b'{"sub": 1e400}'),
        vouched(b'{"sub": NaN}'),
        vouched(b'{"sub": "\\ud800"}'),
        vouched(b'{"sub": "\xed\xa0\x80"}'),
        vouched(json.dumps({"sub": "ann\u202e"}).encode()),
        vouched(json.dumps({"sub": FORGED}).encode()),
        vouched(json.dumps({"sub": "x" * 5_000}).encode()),
        vouched(b'{"sub": ["ann"]}'),
        vouched(b'{"sub": {"ann": 1}}'),
        vouched(b'{"sub": true}'),
        vouched(b'{"sub": "bob", "sub": null}'),
        vouched(b'"ann"'),
        vouched(b""),
    ],
)
def test_a_hostile_identity_is_nobody(world: World, logged: Callable[[], str], header: str) -> None:
    """401, told in one harmless line that repeats nothing of it."""
    with served(world) as http:
        answer = http.get("/exports", headers={USERINFO_HEADER.encode(): header.encode("latin-1")})
    assert answer.status_code == 401
    assert_harmless(answer.text)
    assert_harmless(logged())
    assert len(logged()) < 2_000


@pytest.mark.parametrize("field", ["adapter_path", "status", "base_model_id", "base_model_revision", "merge_base"])
@pytest.mark.parametrize(
    "value",
    [
        *(FORGED, "\0", "\ud800", "x" * 300, "/" + "y/" * 2_000, "x" * (1 << 20), "file://[", "file:///%00"),
        *("gs://b/x", ["a"], {"a": 1}, 7, "//", "../" * 40, "~root"),
    ],
)
def test_a_hostile_training_job_is_no_fault_of_ours(
    world: World, logged: Callable[[], str], field: str, value: Any
) -> None:
    """The training service's documents are as foreign as a caller's body."""
    world.job(**{field: value})
    with served(world) as http:
        answer = http.post("/export", json={"job_id": "job", "export_type": "merged"})
    assert answer.status_code in (202, 400, 404)
    assert_harmless(answer.text)
    assert_harmless(logged())
    assert len(answer.content) < 20_000


def test_links_that_lead_in_a_circle_are_refused(world: World) -> None:
    """By name, like those that lead elsewhere."""
    world.job()
    (world.home / "adapter-job" / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match="symbolic link") as refused:
        world.submit()
    assert refused.value.error_code == "link_refused"


def test_a_folder_with_too_many_files_is_refused(world: World) -> None:
    """400, and which folder."""
    world.job()
    source = world.home / "adapter-job" / "adapter_config.json"
    for number in range(MAX_LISTED_FILES):
        os.link(source, source.with_name(f"{number}.json"))
    with served(world) as http:
        answer = http.post("/export", json={"job_id": "job", "export_type": "merged"})
    assert (answer.status_code, answer.json()["code"]) == (400, "too_many_files")
    assert "adapter-job" in answer.json()["detail"]


def test_a_listing_without_end_is_left_after_as_many_as_may_be() -> None:
    """Neither time nor memory grows with a bucket."""
    found = itertools.count()
    with pytest.raises(SourceError):
        bounded_listing(found, "gs://bucket")
    assert next(found) == MAX_LISTED_FILES + 1
    assert len(bounded_listing(iter(range(MAX_LISTED_FILES)), "gs://bucket")) == MAX_LISTED_FILES


def test_a_record_stays_small_whatever_is_written_to_it(world: World) -> None:
    """An error of a mebibyte, a summary of ten thousand entries: all of it far below Firestore's 1 MiB."""
    world.job()
    world.launched()
    world.claim()
    record = world.record()
    summary: dict[str, Any] = {f"entry {number}": FORGED for number in range(10_000)}
    grown = record.model_copy(update={"summary": summary})
    read = ExportRecord.model_validate(grown.model_dump())
    assert 0 < len(read.summary) < 10_000
    assert read.summary["left_out"] == 10_000 - (len(read.summary) - 1)
    assert len(json.dumps(read.summary)) < MAX_SUMMARY_BYTES + 1_000
    assert ExportRecord.model_validate_json(read.model_dump_json()) == read
    failure = Failure(code="x", message=FORGED + "y" * (1 << 20), retryable=False)
    assert len(failure.message) <= MAX_MESSAGE_LENGTH
    assert not set(failure.message) & set(RISKY)


def test_a_job_is_read_with_its_longest_paths() -> None:
    """What Linux and Cloud Storage allow is no fault."""
    document = {"user_id": "ann", "status": "completed", "base_model_id": "b", "adapter_path": "gs://b/" + "x" * 1024}
    assert TrainingJob.from_document("job", document).adapter_path


def test_a_hostile_message_is_dropped_in_one_line(world: World, logged: Callable[[], str]) -> None:
    """Whatever its id and attributes."""
    for body in (
        FORGED.encode(),
        b"[" * 100_000,
        b"\xff",
        json.dumps({"job_id": FORGED, "export_id": FORGED}).encode(),
    ):
        world.trigger.deliver(body, {"traceparent": FORGED, FORGED: FORGED}, message_id=FORGED)
        world.trigger.deliver_dead(body, message_id=FORGED)
    assert len(logged().splitlines()) == 8
    assert_harmless(logged())
