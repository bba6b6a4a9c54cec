"""Small JSON files that others wrote, read within bounds, and only as every other reader reads them.

Stricter than Python's own reader: UTF-8 alone, no name twice in an object, no NaN and no infinity. Where readers
differ, what is checked here is not what somebody else loads. Source: https://www.rfc-editor.org/rfc/rfc8259
"""

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

MAX_MARKS = 2_000_000
"""Commas and brackets: of each comes a value, which may take a hundred times its own bytes of memory"""
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where half a surrogate pair may be"""
MAX_SHOWN = 80


def read_json_object(path: Path, *, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        ValueError: It is no regular file, larger, or as of `parse_json_object`; the message says which.
        OSError: It cannot be opened or read.
    """
    return parse_json_object(read_bounded(path, limit=limit))


def read_bounded(path: Path, *, limit: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        ValueError: It is no regular file, or has more than `limit` bytes.
        OSError: It cannot be opened or read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is no regular file")
        content = b"" if facts.st_size > limit else file.read(limit + 1)
    if facts.st_size > limit or len(content) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return content


def parse_json_object(content: bytes, *, max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """The JSON object that is all of `content`.

    Args:
        content: UTF-8.
        max_marks: How many commas and opening brackets it may have, within texts too.

    Raises:
        ValueError: It is not JSON, has too many values, is nested too deeply, or not an object; the message says which,
            and shows at most `MAX_SHOWN` characters of it.
    """
    document = parse_json(content, max_marks=max_marks)
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}, an object was expected")
    return document


def parse_json(content: bytes, *, max_marks: int = MAX_MARKS) -> Any:
    """The JSON value that is all of `content`; arguments and errors as of `parse_json_object`."""
    if sum(map(content.count, (b",", b"[", b"{"))) > max_marks:
        raise ValueError(f"it has more than {max_marks} values")
    try:
        document = json.loads(
            content.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_number
        )
        if _HALF.search(content):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it has half a surrogate pair, which is no text") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {twice[:MAX_SHOWN]!r} occurs twice in an object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:MAX_SHOWN]} is larger than any number")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
