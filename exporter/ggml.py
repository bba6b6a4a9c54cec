"""ggml's own quantizers, and its own reader and writer of GGUF metadata, through ctypes.

Source: `ggml.h` and `gguf.h` of llama.cpp, https://github.com/ggml-org/llama.cpp/tree/master/ggml/include
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dispatcher.errors import NotAvailable
from exporter.llama_cpp import SET_UP, library

FILE_TYPE = b"general.file_type"
QUANTIZATION_VERSION = b"general.quantization_version"
ALIGNMENT = 32
"""`GGUF_DEFAULT_ALIGNMENT`; no converter of a Gemma sets another.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

_Pointer, _Size, _Int64, _Name = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_char_p


class _GgmlInit(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", _Size), ("mem_buffer", _Pointer), ("no_alloc", ctypes.c_bool))


class _Number(NamedTuple):
    """A type of numbers: as gguf.h names its setter, for ctypes, and for numpy."""

    name: str
    ctype: Any
    dtype: Any


_NUMBERS = {
    "UINT8": _Number("u8", ctypes.c_uint8, np.uint8),
    "INT8": _Number("i8", ctypes.c_int8, np.int8),
    "UINT16": _Number("u16", ctypes.c_uint16, np.uint16),
    "INT16": _Number("i16", ctypes.c_int16, np.int16),
    "UINT32": _Number("u32", ctypes.c_uint32, np.uint32),
    "INT32": _Number("i32", ctypes.c_int32, np.int32),
    "UINT64": _Number("u64", ctypes.c_uint64, np.uint64),
    "INT64": _Number("i64", ctypes.c_int64, np.int64),
    "FLOAT32": _Number("f32", ctypes.c_float, np.float32),
    "FLOAT64": _Number("f64", ctypes.c_double, np.float64),
    "BOOL": _Number("bool", ctypes.c_bool, np.int8),
}
"""By `GGUFValueType`."""
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_row_size": (_Size, (ctypes.c_int, _Int64)),
    "ggml_quantize_chunk": (_Size, (ctypes.c_int, _Pointer, _Pointer, _Int64, _Int64, _Int64, _Pointer)),
    "ggml_validate_row_data": (ctypes.c_bool, (ctypes.c_int, _Pointer, _Size)),
    "ggml_get_tensor": (_Pointer, (_Pointer, _Name)),
    "ggml_free": (None, (_Pointer,)),
    "ggml_init": (_Pointer, (_GgmlInit,)),
    "ggml_tensor_overhead": (_Size, ()),
    "ggml_new_tensor": (_Pointer, (_Pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Int64))),
    "ggml_set_name": (_Pointer, (_Pointer, _Name)),
    "gguf_set_val_str": (None, (_Pointer, _Name, _Name)),
    "gguf_set_arr_data": (None, (_Pointer, _Name, ctypes.c_int, _Pointer, _Size)),
    "gguf_set_arr_str": (None, (_Pointer, _Name, ctypes.POINTER(_Name), _Size)),
    **{f"gguf_set_val_{number.name}": (None, (_Pointer, _Name, number.ctype)) for number in _NUMBERS.values()},
    "gguf_init_empty": (_Pointer, ()),
    "gguf_free": (None, (_Pointer,)),
    "gguf_set_kv": (None, (_Pointer, _Pointer)),
    "gguf_find_key": (_Int64, (_Pointer, _Name)),
    "gguf_get_val_u32": (ctypes.c_uint32, (_Pointer, _Int64)),
    "gguf_add_tensor": (None, (_Pointer, _Pointer)),
    "gguf_set_tensor_type": (None, (_Pointer, _Name, ctypes.c_int)),
    "gguf_get_tensor_offset": (_Size, (_Pointer, _Int64)),
    "gguf_get_tensor_size": (_Size, (_Pointer, _Int64)),
    "gguf_get_meta_size": (_Size, (_Pointer,)),
    "gguf_get_meta_data": (None, (_Pointer, _Pointer)),
}


@cache
def _ggml() -> ctypes.CDLL:
    """libggml-base.

    Raises:
        NotAvailable: `libggml_missing`, `llama_cpp_mismatch`.
    """
    path = library("libggml-base")
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NotAvailable(f"libggml-base cannot be used: {error}. {SET_UP}", code="llama_cpp_mismatch") from error
    return loaded


def load() -> None:
    """Load libggml-base, as whatever else is here does by itself.

    Raises:
        NotAvailable: `libggml_missing`, `llama_cpp_mismatch`.
    """
    _ggml()


def row_bytes(kind: int, width: int) -> int:
    """Bytes of a row of `width` weights in a tensor type."""
    return int(_ggml().ggml_row_size(kind, width))


def quantize(kind: int, rows: torch.Tensor, buffer: bytearray, offset: int) -> int:
    """Quantize whole rows into a buffer; other threads run meanwhile.

    Args:
        kind: A tensor type; its block size divides the width.
        rows: [rows, width], float32, contiguous, finite.
        buffer: Where to.
        offset: Where in it.

    Returns:
        How many bytes were written.
    """
    count, width = rows.shape
    size = count * row_bytes(kind, width)
    room = (ctypes.c_char * size).from_buffer(buffer, offset)
    return int(_ggml().ggml_quantize_chunk(kind, rows.data_ptr(), ctypes.addressof(room), 0, count, width, None))


def is_sound(kind: int, buffer: bytearray, offset: int, size: int) -> bool:
    """Whether `size` bytes are blocks of a tensor type without NaN or infinity in their weights or scales."""
    room = (ctypes.c_char * size).from_buffer(buffer, offset)
    return bool(_ggml().ggml_validate_row_data(kind, ctypes.addressof(room), size))


class Metadata:
    """The metadata of a GGUF file in ggml's own hands: key-values, and names, shapes and types of tensors.

    Args:
        writer: llama.cpp's Python writer, as a converter left it; that writes a vocabulary one value at a time.
    """

    def __init__(self, writer: Any) -> None:
        ggml = _ggml()
        tensors = writer.tensors[0]
        self._file = _Pointer(ggml.gguf_init_empty())
        room = ggml.ggml_tensor_overhead() * (len(tensors) + 1)
        self._shapes = _Pointer(ggml.ggml_init(_GgmlInit(room, None, True)))
        for key, value in writer.kv_data[0].items():
            _set(self._file, key.encode(), value)
        for name, info in tensors.items():
            sizes = (_Int64 * len(info.shape))(*reversed(info.shape))
            tensor = _Pointer(ggml.ggml_new_tensor(self._shapes, int(info.dtype), len(sizes), sizes))
            ggml.ggml_set_name(tensor, name.encode())
            ggml.gguf_add_tensor(self._file, tensor)
        self._count = len(tensors)

    def __enter__(self) -> "Metadata":
        return self

    def __exit__(self, *_: object) -> None:
        _ggml().gguf_free(self._file)
        _ggml().ggml_free(self._shapes)

    def write(self, path: Path) -> int:
        """Write it without any tensor's data, over what is there; the size that the whole file would have.

        Raises:
            OSError: It cannot be written.
        """
        path.write_bytes(_head(self._file))
        return path.stat().st_size + sum(size + -size % ALIGNMENT for _, size in _places(self._file, self._count))

    def quantized(self, tensors: Sequence[tuple[str, int]], file_type: int) -> tuple[bytes, list[tuple[int, int]]]:
        """The head of the file that llama.cpp's quantizer makes of this one.

        Args:
            tensors: Name and tensor type of each tensor, in the order of the output.
            file_type: The `llama_ftype` of the output.

        Returns:
            All bytes before the first tensor's; of each tensor, where its bytes begin after that, and how many.
        """
        ggml = _ggml()
        output = _Pointer(ggml.gguf_init_empty())
        try:
            ggml.gguf_set_kv(output, self._file)
            version = ggml.gguf_get_val_u32(self._file, ggml.gguf_find_key(self._file, QUANTIZATION_VERSION))
            ggml.gguf_set_val_u32(output, QUANTIZATION_VERSION, version)
            ggml.gguf_set_val_u32(output, FILE_TYPE, file_type)
            for name, kind in tensors:
                ggml.gguf_add_tensor(output, ggml.ggml_get_tensor(self._shapes, name.encode()))
                ggml.gguf_set_tensor_type(output, name.encode(), kind)
            return _head(output), _places(output, len(tensors))
        finally:
            ggml.gguf_free(output)


def _places(file: ctypes.c_void_p, count: int) -> list[tuple[int, int]]:
    """Of each tensor, where its bytes begin after the head, and how many they are."""
    offset, size = _ggml().gguf_get_tensor_offset, _ggml().gguf_get_tensor_size
    return [(int(offset(file, index)), int(size(file, index))) for index in range(count)]


def _head(file: ctypes.c_void_p) -> bytes:
    head = ctypes.create_string_buffer(_ggml().gguf_get_meta_size(file))
    _ggml().gguf_get_meta_data(file, head)
    return head.raw


def _set(file: ctypes.c_void_p, key: bytes, value: Any) -> None:
    """Set a key to a `GGUFValue`, as `GGUFWriter` would pack it."""
    import gguf

    ggml, kinds = _ggml(), gguf.GGUFValueType
    if value.type == kinds.STRING:
        ggml.gguf_set_val_str(file, key, _encoded(value.value))
    elif value.type != kinds.ARRAY:
        getattr(ggml, f"gguf_set_val_{_NUMBERS[value.type.name].name}")(file, key, value.value)
    else:
        kind = value.sub_type or (kinds.UINT8 if isinstance(value.value, bytes) else kinds.get_type(value.value[0]))
        if kind == kinds.STRING:
            strings = (_Name * len(value.value))(*map(_encoded, value.value))
            ggml.gguf_set_arr_str(file, key, strings, len(strings))
        else:
            numbers = np.array(list(value.value), dtype=_NUMBERS[kind.name].dtype)
            ggml.gguf_set_arr_data(file, key, int(kind), numbers.ctypes.data, len(numbers))


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
