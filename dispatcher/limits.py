"""How much of anything a request, an answer and a record may hold."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

from dispatcher.errors import SourceError

MAX_BODY_BYTES = 64 << 10
"""Of a request. One with the longest id and token takes under 1 KiB."""
PAGE = 100
"""Exports in one answer."""
MAX_LISTED_FILES = 10_000
"""Files in one listing. The largest artifact has some hundreds; a bucket's root may have any number."""
MAX_PATH_LENGTH = 4_096
"""Characters of a URI or path in a training job: a path's on Linux; an object's name in a bucket has at most 1,024."""
MAX_NAME_LENGTH = 1_024
"""Characters of any other field of a training job: a model's id, a revision, a status."""
MAX_MESSAGE_LENGTH = 4_000
"""Characters of an error's text in a record."""
MAX_SUMMARY_BYTES = 64 << 10
"""Of a record's summary as JSON. A Firestore document has at most 1 MiB, all of it read with every heartbeat."""
RETRY_AFTER_SECONDS = {429: 60, 503: 5}
"""What an answer tells a caller to wait: until an export may have ended; until a service may answer again."""

Listed = TypeVar("Listed")


def bounded_listing(files: Iterator[Listed], uri: str) -> list[Listed]:
    """All of `files`, which were found under a URI.

    Raises:
        SourceError: There are over `MAX_LISTED_FILES` (`too_many_files`); the rest was not looked at.
    """
    found = [*islice(files, MAX_LISTED_FILES + 1)]
    if len(found) > MAX_LISTED_FILES:
        raise SourceError(
            f"there are over {MAX_LISTED_FILES} files under {uri}: expected a folder with the files of one model or"
            " adapter; does the path end too early?",
            code="too_many_files",
        )
    return found


def small_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary's first entries, as many as have room in a record; `left_out` counts the others."""
    room, kept = MAX_SUMMARY_BYTES, dict[str, Any]()
    for name, value in summary.items():
        room -= len(json.dumps([name, value], default=str))
        if room < 0:
            return {**kept, "left_out": len(summary) - len(kept)}
        kept[name] = value
    return summary
