"""Small JSON files that others wrote, read within bounds."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path, *, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        ValueError: It is larger, not JSON, nested too deeply, or not an object; the message says which.
    """
    if path.stat().st_size > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return parse_json_object(path.read_bytes())


def parse_json_object(content: bytes) -> dict[str, Any]:
    """The JSON object that is all of `content`.

    Raises:
        ValueError: It is not JSON, nested too deeply, or not an object; the message says which.
    """
    try:
        document = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}, an object was expected")
    return document
