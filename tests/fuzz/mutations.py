"""Damage to JSON that leaves it JSON: what random bytes make of it, its reader mostly refuses, and nobody else sees."""

import random
import re

VALUES = (
    *(b"null", b"true", b"-1", b"0", b"1", b"0.5", b"4294967296", b"9" * 30, b"1e99", b"NaN"),
    *(b"[]", b"{}", b"[[[]]]", b'{"a":[{}]}', b'[0,0]', b'""', b'"a"', b'"\\u0000"', b'"\\ud800"', b'"F32"', b'".*"'),
)  # fmt: skip
"""What is put in the place of others"""
_BEGINS = re.compile(rb"[:,\[{]\s*")
_ENDS = re.compile(rb"[,\]}]")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """One or a few values replaced, taken out, put twice, or put in another's place."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        start, end = _span(content, chance)
        other = content[slice(*_span(content, chance))]
        piece = chance.choice((chance.choice(VALUES), chance.choice(VALUES), other, b"", _twice(content[start:end])))
        content = content[:start] + piece + content[end:]
    return content


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    """Where some value is: from one mark to another, mostly the next."""
    begins = [match.end() for match in _BEGINS.finditer(content)] or [0]
    start = chance.choice(begins)
    ends = [match.start() for match in _ENDS.finditer(content, start, start + 400)] or [len(content)]
    return start, ends[min(len(ends) - 1, chance.choice((0, 0, 0, 1, 2, 5)))]


def _twice(piece: bytes) -> bytes:
    return piece + b"," + piece
