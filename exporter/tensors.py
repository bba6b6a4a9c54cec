"""Bytes of a checkpoint as torch tensors, read into memory of our own."""

import math
from collections.abc import Iterator

import torch

from exporter.checkpoint import Tensor, TensorFile

TORCH_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The floating dtypes that a fold reads or writes, by their safetensors name."""

PART_ELEMENTS = 1 << 20


def read_tensor(file: TensorFile, tensor: Tensor) -> torch.Tensor:
    """One whole tensor, of its own shape and dtype; for small ones (an adapter's)."""
    return read_elements(file, tensor, 0, math.prod(tensor.shape)).view(tensor.shape)


def read_elements(file: TensorFile, tensor: Tensor, first: int, count: int) -> torch.Tensor:
    """`count` elements of a tensor, from the flat index `first` on, of its own dtype; 1-D."""
    dtype = TORCH_DTYPE[tensor.dtype]
    data = bytearray(count * dtype.itemsize)
    with file.open() as reader:
        reader.read_into(memoryview(data), tensor.start + first * dtype.itemsize)
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def same_values(file: TensorFile, tensor: Tensor, other_file: TensorFile, other: Tensor) -> bool:
    """Whether two floating tensors hold the same numbers, of whatever dtypes; read block by block."""
    if tensor.shape != other.shape:
        return False
    pairs = zip(parts_of(file, tensor), parts_of(other_file, other), strict=True)
    return all(torch.equal(values.double(), others.double()) for values, others in pairs)


def is_zero(file: TensorFile, tensor: Tensor) -> bool:
    """Whether a tensor is zero everywhere."""
    return not any(bool(part.any()) for part in parts_of(file, tensor))


def is_sound(values: torch.Tensor, *, unbounded: bool = False) -> bool:
    """Whether there is no NaN, and no infinity unless that is what the values are for."""
    if not values.numel():
        return True
    # NaN is both the least and the greatest of what it is among; this is many times as fast as `isfinite`.
    ends = torch.stack(torch.aminmax(values))
    return not bool((torch.isnan(ends) if unbounded else ~torch.isfinite(ends)).any())


def parts_of(file: TensorFile, tensor: Tensor) -> Iterator[torch.Tensor]:
    """A tensor of any size in pieces, 1-D and of its own dtype, in order."""
    dtype = TORCH_DTYPE[tensor.dtype]
    size = PART_ELEMENTS * dtype.itemsize
    with file.open() as reader, reader.stream(tensor.start, tensor.start + tensor.nbytes) as stream:
        for done in range(0, tensor.nbytes, size):
            data = bytearray(min(size, tensor.nbytes - done))
            stream.read_into(memoryview(data))
            yield torch.frombuffer(data, dtype=dtype)
