"""The checksum that Cloud Storage itself reports, computed while bytes pass by."""

import base64
import ctypes

import google_crc32c

_BLOCK = 1 << 20


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
