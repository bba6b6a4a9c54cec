"""Each log line is one JSON object, and no secret gets into it by any way."""

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.logs import bound, clean, configure, redact, trace_fields

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """Configures logging for the test; `parsed` afterwards reads it back. Yields a list that fills on demand."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    root.handlers[:] = []
    configure(stream, {"service": "test"})

    class Lines(list[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter([json.loads(line) for line in stream.getvalue().splitlines()])

    yield Lines()
    root.handlers[:] = before
    root.setLevel(level)


def test_a_line_carries_severity_message_and_ids(lines: list[dict[str, Any]]) -> None:
    """As Cloud Logging reads them, with what was bound around."""
    with bound(export_id="job.merged", **trace_fields(f"00-{'a' * 32}-{'b' * 16}-01", "project")):
        logging.getLogger("x").warning("took %d s", 3, extra={"stage": "merge"})
    (line,) = lines
    assert (line["severity"], line["message"], line["service"]) == ("WARNING", "took 3 s", "test")
    assert (line["export_id"], line["stage"]) == ("job.merged", "merge")
    assert line["logging.googleapis.com/trace"] == f"projects/project/traces/{'a' * 32}"


def test_a_token_is_removed_wherever_it_stands(lines: list[dict[str, Any]]) -> None:
    """In the message, an argument, an extra field, an exception and its cause."""
    logger = logging.getLogger("x")
    logger.info(f"token {TOKEN}")
    logger.info("token %s and %r", TOKEN, {"key": TOKEN})
    logger.info("header %s", f"Authorization: Bearer {TOKEN}.abc")
    logger.info("field", extra={"url": f"https://user:{TOKEN}@host"})
    try:
        try:
            raise ValueError(TOKEN)
        except ValueError as error:
            raise RuntimeError(f"with {TOKEN}") from error
    except RuntimeError:
        logger.exception("failed")
    assert TOKEN not in json.dumps(list(lines))
    assert "RuntimeError" in list(lines)[-1]["exception"]


@pytest.mark.parametrize(
    "token",
    [
        *("hf_AbCdEfGhIj", "hf_oauth_eyJhbGciOiJFZERTQSJ9.abc.d-f_g", "hf_jwt_eyJhbGciOiJFZERTQSJ9.abc"),
        *("hf_app_Abcdefghijk", "hf_sandbox_abcdefgh", "hf_token_abcdef", "hf_hub_downloadX", "api_org_ABCDEFGHIJ"),
        *("ya29.a0AfH6SMBx-y_z.0123", "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2ln-_8"),
    ],
)
@pytest.mark.parametrize("text", ["x {}", "'{}'", "token={}&x=1", "x\\n{}", "https://user:{}@host/"])
def test_every_family_of_tokens_is_removed_whole(token: str, text: str) -> None:
    """Also behind its dots and underscores; what stands beside it stays."""
    before, _, after = text.partition("{}")
    redacted = redact(text.format(token))
    assert re.fullmatch(rf"{re.escape(before)}(hf_|api_org_|ya29\.)?\[(JWT )?removed\]{re.escape(after)}", redacted)


@pytest.mark.parametrize(
    "header", ["Authorization: Bearer abc", "authorization: basic YTpi", "{'Authorization': 'Basic YTpi'"]
)
def test_what_opens_a_door_in_a_header_is_removed(header: str) -> None:
    """In a request that a library shows in its error."""
    assert "[removed]" in redact(header)
    assert not re.search("abc|YTpi", redact(header))


@pytest.mark.parametrize("name", ["X-Amz-Signature", "X-Goog-Signature", "Signature"])
def test_a_signed_url_is_told_without_its_signature(name: str) -> None:
    """huggingface_hub warns with the URL of a download that broke off."""
    url = f"https://storage.test/file?X-Amz-Date=1&{name}=aB3~x%2F_-&Expires=2"
    told = redact(f"'timed out' thrown while requesting GET {url}.")
    assert "aB3" not in told
    assert told.endswith(f"X-Amz-Date=1&{name}=[removed]&Expires=2.")


@pytest.mark.parametrize(
    "text",
    [
        "POST again with hf_token.",
        'File "huggingface_hub/hf_api.py", line 1, in hf_hub_download',
        "in hf_raise_for_status; hf_transfer, hf_xet",
        "a basic fact, rehf_",
        "gs://bucket/merged_models/job/eyJob.txt",
    ],
)
def test_what_only_looks_like_a_token_stays(text: str) -> None:
    """A traceback or a way out that lost its names would help nobody."""
    assert redact(text) == text


def test_a_text_full_of_beginnings_is_searched_in_no_time() -> None:
    """Whoever sends one holds up nobody."""
    start = time.perf_counter()
    for beginning in ("eyJ", "hf_", "eyJaaaa.", "ya29.", "bearer "):
        redact(beginning * 10_000)
    assert time.perf_counter() - start < 2


@given(st.text(), st.text(st.characters(categories=["L", "N"], max_codepoint=127), min_size=6))
def test_no_text_around_a_token_lets_it_through(text: str, secret: str) -> None:
    """Whatever stands beside it, and wherever the text is cut."""
    token = f"hf_{secret}"
    assert token not in redact(f"{text}{token}")
    assert token not in clean(f"{text}{token}", limit=len(text) + 3 + len(secret) // 2)


def test_a_message_cannot_forge_a_line_or_a_terminal_sequence(lines: list[dict[str, Any]]) -> None:
    """Control characters arrive escaped, in one line."""
    logging.getLogger("x").info("a\r\n{}\x1b[31m\u2028\x85b")
    (line,) = lines
    assert not set(line["message"]) & set("\r\x1b\u2028\x85")


def test_a_long_text_is_cut_and_says_so(lines: list[dict[str, Any]]) -> None:
    """A log entry has a limit of its own."""
    logging.getLogger("x").info("y" * 100_000)
    (line,) = lines
    assert len(line["message"]) < 9_000
    assert "it has 100000 characters" in line["message"]


def test_arguments_that_do_not_fit_are_logged_all_the_same(lines: list[dict[str, Any]]) -> None:
    """A wrong log call loses nothing and raises nothing."""
    logging.getLogger("x").info("%d", "no number")
    (line,) = lines
    assert "no number" in line["message"]


@pytest.mark.parametrize("header", [None, "", "garbage", "00-short-x-01", f"00-{'g' * 32}-{'b' * 16}-01"])
def test_a_malformed_traceparent_is_ignored(header: str | None) -> None:
    """It is somebody else's header."""
    assert trace_fields(header, "p") == {}
