"""The checksum that Cloud Storage itself reports, computed while bytes pass by."""

import base64
import ctypes
from collections.abc import Iterable

import google_crc32c

_BLOCK = 1 << 20
_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, its highest bit the lowest power"""


class Crc32c:
    """A running crc32c over any buffer; the C extension itself takes nothing but `bytes`."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        if isinstance(data, bytes):
            self._value = google_crc32c.extend(self._value, data)
            return
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        if not view.readonly:
            # The extension refuses bytearray and memoryview, but takes a ctypes array over the same memory.
            array = (ctypes.c_char * view.nbytes).from_buffer(view)
            self._value = google_crc32c.extend(self._value, array)
            return
        for start in range(0, view.nbytes, _BLOCK):
            self._value = google_crc32c.extend(self._value, bytes(view[start : start + _BLOCK]))

    @property
    def text(self) -> str:
        """Base64 of the 4 big-endian bytes."""
        return base64.b64encode(self._value.to_bytes(4, "big")).decode()


def combined(parts: Iterable[tuple[int, str]]) -> str:
    """The crc32c of what several parts are together, from theirs alone.

    That of `a + b` is that of `a`, times x to the power of the bits in `b` modulo the polynomial, plus that of `b`, as
    in zlib's `crc32_combine` (https://github.com/madler/zlib/blob/v1.3.1/crc32.c); the polynomial is Castagnoli's
    (RFC 3720, appendix B.4).

    Args:
        parts: Of each, in order, its size in bytes and its crc32c in base64.

    Returns:
        Base64 of the 4 big-endian bytes.
    """
    value = 0
    for size, text in parts:
        value = _product(_power_of_x(8 * size), value) ^ int.from_bytes(base64.b64decode(text), "big")
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2) of degree below 32, modulo Castagnoli's; the highest bit is the lowest power."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result


def _power_of_x(exponent: int) -> int:
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _product(square, result)
        square = _product(square, square)
        exponent >>= 1
    return result
