"""Bytes of a checkpoint as torch tensors, read with pread into memory of our own.

Not through mmap: touched pages of a mapping count as resident, so a whole model would.
"""

import math
import os

import torch

from exporter.checkpoint import Tensor, TensorFile, changed

TORCH_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The floating dtypes that a fold reads or writes, by their safetensors name."""

COMPARED_ELEMENTS = 1 << 20


def read_into(fd: int, buffer: memoryview, offset: int, name: str) -> None:
    """Fill `buffer` from byte `offset` of an open file.

    Raises:
        Unavailable: `source_changed` when the file ends before that: it was complete when its header was read.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise changed(name)
        done += count


def read_tensor(file: TensorFile, tensor: Tensor) -> torch.Tensor:
    """One whole tensor, of its own shape and dtype; for small ones (an adapter's)."""
    data = bytearray(tensor.nbytes)
    with file.open() as source:
        read_into(source.fileno(), memoryview(data), tensor.start, file.name)
    if not data:
        return torch.empty(tensor.shape, dtype=TORCH_DTYPE[tensor.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPE[tensor.dtype]).view(tensor.shape)


def read_elements(file: TensorFile, tensor: Tensor, first: int, count: int) -> torch.Tensor:
    """`count` elements of a tensor, from the flat index `first` on, of its own dtype; 1-D."""
    dtype = TORCH_DTYPE[tensor.dtype]
    data = bytearray(count * dtype.itemsize)
    with file.open() as source:
        read_into(source.fileno(), memoryview(data), tensor.start + first * dtype.itemsize, file.name)
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def same_values(file: TensorFile, tensor: Tensor, other_file: TensorFile, other: Tensor) -> bool:
    """Whether two floating tensors hold the same numbers, of whatever dtypes; read block by block."""
    if tensor.shape != other.shape:
        return False
    total = math.prod(tensor.shape)
    for first in range(0, total, COMPARED_ELEMENTS):
        count = min(COMPARED_ELEMENTS, total - first)
        values, others = read_elements(file, tensor, first, count), read_elements(other_file, other, first, count)
        if not torch.equal(values.double(), others.double()):
            return False
    return True


def is_zero(file: TensorFile, tensor: Tensor) -> bool:
    """Whether a small tensor is zero everywhere."""
    return not bool(read_tensor(file, tensor).any())
