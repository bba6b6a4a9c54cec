"""ggml's own quantizers, and its own reader and writer of GGUF metadata, through ctypes.

Source: `ggml.h` and `gguf.h` of llama.cpp, https://github.com/ggml-org/llama.cpp/tree/master/ggml/include
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from dispatcher.errors import NotAvailable
from exporter.llama_cpp import library

FILE_TYPE = b"general.file_type"
QUANTIZATION_VERSION = b"general.quantization_version"

_Pointer, _Size, _Int64, _Name = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_char_p


class _InitParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(_Pointer)))


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_row_size": (_Size, (ctypes.c_int, _Int64)),
    "ggml_quantize_chunk": (_Size, (ctypes.c_int, _Pointer, _Pointer, _Int64, _Int64, _Int64, _Pointer)),
    "ggml_validate_row_data": (ctypes.c_bool, (ctypes.c_int, _Pointer, _Size)),
    "ggml_get_tensor": (_Pointer, (_Pointer, _Name)),
    "ggml_free": (None, (_Pointer,)),
    "gguf_init_from_file": (_Pointer, (_Name, _InitParams)),
    "gguf_init_empty": (_Pointer, ()),
    "gguf_free": (None, (_Pointer,)),
    "gguf_set_kv": (None, (_Pointer, _Pointer)),
    "gguf_find_key": (_Int64, (_Pointer, _Name)),
    "gguf_get_val_u32": (ctypes.c_uint32, (_Pointer, _Int64)),
    "gguf_set_val_u32": (None, (_Pointer, _Name, ctypes.c_uint32)),
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
        raise NotAvailable(
            f"libggml-base cannot be used: {error}. Run `make setup` again.", code="llama_cpp_mismatch"
        ) from error
    return loaded


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


def metadata_of(
    template: Path, tensors: Sequence[tuple[str, int]], file_type: int
) -> tuple[bytes, list[tuple[int, int]]]:
    """The head of a GGUF file, as llama.cpp's own quantizer writes it.

    Args:
        template: A GGUF file with the key-values and the shapes; its tensors' data are not read.
        tensors: Name and tensor type of each tensor, in the order of the output.
        file_type: The `llama_ftype` of the output.

    Returns:
        All bytes before the first tensor's; of each tensor, where its bytes begin after that, and how many they are.
    """
    ggml = _ggml()
    shapes = _Pointer()
    source = _Pointer(ggml.gguf_init_from_file(bytes(template), _InitParams(True, ctypes.pointer(shapes))))
    if not source:
        raise ValueError("ggml cannot read what the converter wrote")
    output = _Pointer(ggml.gguf_init_empty())
    try:
        ggml.gguf_set_kv(output, source)
        version = ggml.gguf_get_val_u32(source, ggml.gguf_find_key(source, QUANTIZATION_VERSION))
        ggml.gguf_set_val_u32(output, QUANTIZATION_VERSION, version)
        ggml.gguf_set_val_u32(output, FILE_TYPE, file_type)
        for name, kind in tensors:
            ggml.gguf_add_tensor(output, ggml.ggml_get_tensor(shapes, name.encode()))
            ggml.gguf_set_tensor_type(output, name.encode(), kind)
        places = [
            (int(ggml.gguf_get_tensor_offset(output, i)), int(ggml.gguf_get_tensor_size(output, i)))
            for i in range(len(tensors))
        ]
        head = ctypes.create_string_buffer(ggml.gguf_get_meta_size(output))
        ggml.gguf_get_meta_data(output, head)
        return head.raw, places
    finally:
        ggml.gguf_free(output)
        ggml.gguf_free(source)
        ggml.ggml_free(shapes)
