"""One JSON object a line, as Cloud Logging reads it, with trace and ids and without secrets."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

MAX_TEXT = 8_000
"""Longest text of a field, in characters; Cloud Logging refuses entries over 256 KiB."""
MAX_READ = 256 << 10
"""Of a longer text only as many characters are looked at: the search for secrets takes its time."""
_NAMES = "api|hub_download|hub_url|raise_for_status|token|transfer|xet"
"""What begins like a token of Hugging Face's and is a name, in tracebacks and in our own messages."""
_SECRETS = (
    # Of users, organizations, OAuth and jobs: hf_…, hf_oauth_…, hf_jwt_…, hf_app_…, api_org_…
    (re.compile(rf"hf_(?!(?:{_NAMES})(?![A-Za-z0-9_-]))[A-Za-z0-9._-]{{6,}}"), "hf_[removed]"),
    (re.compile(r"api_org_[A-Za-z0-9]{6,}"), "api_org_[removed]"),
    # Access tokens of Google's, and JWTs; bounded, or a text full of beginnings would take for ever.
    (re.compile(r"ya29\.[A-Za-z0-9._-]{6,}"), "ya29.[removed]"),
    (re.compile(r"eyJ[A-Za-z0-9_-]{4,1000}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*"), "[JWT removed]"),
    # Signed URLs of buckets and of the hub's storage: whoever has the signature has the file.
    (re.compile(r"(?i)\b((?:X-(?:Amz|Goog)-)?Signature=)[^&\s'\"<>)]+"), r"\1[removed]"),
    (re.compile(r"(?i)\b(bearer\s+|authorization\W{1,4}basic\s+)[A-Za-z0-9._~+/=-]+"), r"\1[removed]"),
)
_RISKY = (
    r"\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f"
)
"""What makes a line, a terminal or a reader show something else than is there: control characters, line separators,
marks of direction and of no width, half surrogate pairs. Source: https://www.unicode.org/reports/tr36/"""
_CONTROL = re.compile(rf"[\x00-\x1f{_RISKY}]")
_CONTROL_IN_LINES = re.compile(rf"[\x00-\x08\x0b-\x1f{_RISKY}]")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_BOUND: ContextVar[Mapping[str, Any]] = ContextVar("gemma_export_log_fields", default={})  # noqa: B039  # never mutated


def redact(text: str) -> str:
    """`text` without tokens (Hugging Face's, Google's, bearer) and signatures of URLs: for log lines and records."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def clean(text: str, *, limit: int = MAX_TEXT, lines: bool = False) -> str:
    """`text` of one line, without secrets, with what is not what it looks like escaped: at most `limit` characters.

    What is clean stays as it is.

    Args:
        limit: What is longer is cut, and says so.
        lines: Leave line breaks and tabs, as in a traceback.
    """
    whole, text = len(text), text[:MAX_READ]
    # Redacted before the cut, or a cut through a token would leave its first half.
    text = redact(text)
    if whole > MAX_READ:
        text = "".join(text.rsplit(maxsplit=1)[:-1])  # it may be the first half of a token
    text = (_CONTROL_IN_LINES if lines else _CONTROL).sub(_escaped, text)
    if len(text) <= limit and whole <= MAX_READ:
        return text
    told = f"… (cut: it has {whole} characters)"
    return text[: max(0, limit - len(told))] + told


def _escaped(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode()


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Adds fields to every line logged inside, in this context: ids, or a W3C `traceparent`."""
    token = _BOUND.set({**_BOUND.get(), **fields})
    try:
        yield
    finally:
        _BOUND.reset(token)


def traceparent_of(text: str | None) -> str | None:
    """`text` if it is a W3C `traceparent`, else None: it is passed on to messages and executions."""
    return text if _TRACEPARENT.fullmatch(text or "") else None


def trace_fields(traceparent: str | None, project_id: str | None) -> dict[str, str]:
    """Cloud Logging's trace fields for a W3C `traceparent`; none when it is missing or malformed."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if not match:
        return {}
    trace = f"projects/{project_id}/traces/{match[1]}" if project_id else match[1]
    return {"logging.googleapis.com/trace": trace, "logging.googleapis.com/spanId": match[2]}


class SecretFilter(logging.Filter):
    """Settles a record's texts for good: arguments merged, tokens removed, control characters escaped."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = f"{record.msg!s} (its arguments do not fit: {record.args!r})"
        record.msg, record.args = clean(message), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = clean(record.exc_text, lines=True)
            # A later formatter would otherwise render the exception again, token and all.
            record.exc_info = None
        return True


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: severity, message, time, logger, trace, ids, extra fields, exception.

    Args:
        fields: Part of every line.
        project_id: Whose traces a `traceparent` among the fields belongs to.
    """

    def __init__(self, fields: Mapping[str, Any], project_id: str | None = None) -> None:
        super().__init__()
        self._fields = dict(fields)
        self._project_id = project_id

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        fields = {**self._fields, **_BOUND.get(), **extra}
        trace = trace_fields(fields.pop("traceparent", None), self._project_id)
        line: dict[str, Any] = {
            "severity": record.levelname,
            "message": clean(record.getMessage()),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "logger": record.name,
            **trace,
            **{name: _plain(value) for name, value in fields.items() if value is not None},
        }
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else clean(str(value))


def configure(
    stream: TextIO,
    fields: Mapping[str, Any] | None = None,
    *,
    project_id: str | None = None,
    level: int = logging.INFO,
) -> None:
    """Send all logging of this process to `stream`, one JSON object a line, each with `fields`."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(SecretFilter())
    handler.setFormatter(JsonFormatter(fields or {}, project_id))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # httpx logs every request URL at INFO: noise in a log that has its own line per request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
