"""`python -m exporter.pattern_run DIRECTORY`: which names a stranger's regular expressions match, in Python's own `re`.

For `exporter.peft_patterns`, within the limits of `exporter.limited`: a pattern may work on one name for ever, and no
thread of the process that it works in gets a turn meanwhile.
"""

import re
import sys
from pathlib import Path
from typing import Any

from exporter.limited import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Of each of the request's `patterns`, the `names` that it is all of; None in place of what is no pattern."""
    return {"matched": [_matched(pattern, request["names"]) for pattern in request["patterns"]]}


def _matched(pattern: str, names: list[str]) -> list[str] | None:
    try:
        known = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return None
    return [name for name in names if known.fullmatch(name)]


if __name__ == "__main__":
    serve(Path(sys.argv[1]), answer)
