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
    try:
        document = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}, an object was expected")
    return document
