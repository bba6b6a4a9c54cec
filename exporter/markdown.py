"""What model cards are written with: nothing that comes from outside can break their Markdown, or a shell's line."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_TEXT = 200


def table(rows: Mapping[str, Any]) -> str:
    """Two columns without a heading; a mapping within becomes rows of its own."""
    return grid(("", ""), ((words(" ".join(path)), code(value)) for path, value in _leaves(rows)))


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are clean already."""
    lines = [_line(headings), "|" + "---|" * len(headings), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _leaves(rows: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in rows.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def words(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9 ]+", " ", key).strip()[:MAX_TEXT] or "?"


def code(value: object) -> str:
    """Any value as a code span, in which nothing is Markdown, and nothing ends it or the table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    clean = "".join(c if c.isascii() and c.isprintable() and c not in "`|\\" else "?" for c in text)
    return f"`{clean[:MAX_TEXT].strip() or '?'}`"


def last_part(uri: str) -> str:
    """The name of a directory without where it lies, which is nobody else's business."""
    parts = [part for part in re.split(r"[/\\]", uri) if part]
    return parts[-1] if parts else "base"


def slug(uri: str) -> str:
    """The last part of an id or a path, safe as a heading, a file's name and a shell's word: `[A-Za-z0-9.-]`, at most
    80 characters, neither dot nor hyphen at its ends."""
    clean = re.sub(r"[^A-Za-z0-9.-]+", "-", last_part(uri)).strip("-.")[:80].strip("-.")
    return clean or "gemma"
