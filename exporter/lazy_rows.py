"""Merged tensors as llama.cpp's converter sees them: nothing is read until their bytes are wanted, row by row.

Imported after `exporter.llama_cpp.ensure_importable`. What the converter does to whole rows (a wider dtype, other
memory, fewer rows, rows of zeros after them) is kept as it is asked for; anything else it does on the whole tensor, in
its own way. Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/lazy.py
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import torch
from conversion.base import LazyTorchTensor


@dataclass(frozen=True)
class Rows:
    """Rows of a merged tensor."""

    source: str | None
    """Its name in the checkpoint; None where all rows are zeros"""
    shape: tuple[int, ...]
    """As the converter sees it"""
    kept: int
    """How many of its own rows it has, along the first dimension; the rest are zeros"""


class LazyRows(LazyTorchTensor):  # type: ignore[misc]  # llama.cpp ships no types
    """A merged tensor that the converter may cut, pad and widen without anybody reading it.

    Args:
        rows: Which.
        dtype: As it is stored.
        read: Gives all of it, [*shape], in `dtype`.
    """

    _tensor_type = torch.Tensor

    def __init__(self, rows: Rows, dtype: torch.dtype, read: Callable[[Rows], torch.Tensor]) -> None:
        meta = LazyTorchTensor.meta_with_dtype_and_shape(dtype, rows.shape)
        super().__init__(meta=meta, args=(rows, dtype), func=lambda rows, dtype: read(rows).to(dtype))
        self._rows, self._dtype, self._read = rows, dtype, read

    @classmethod
    def _wrap_fn(cls, fn: Any, **options: Any) -> Any:
        return LazyTorchTensor._wrap_fn(fn, **options)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, dtype: torch.dtype | None = None, device: object = None) -> "LazyRows":
        return LazyRows(self._rows, dtype or self._dtype, self._read)

    def numpy(self) -> Any:
        if not self._rows.shape:
            return LazyTorchTensor.numpy(self)
        return RowArray(self._rows, self._rows.shape, np.dtype(np.float32))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and _is_padded(*args, **(kwargs or {})):
            own, zeros = args[0]
            shape = (own.shape[0] + zeros.shape[0], *own.shape[1:])
            return LazyRows(replace(own._rows, shape=shape), own._dtype, own._read)
        return LazyTorchTensor.__torch_function__(func, types, args, kwargs)


def _cut(own: LazyRows, index: Any) -> Any:
    """The first rows; anything else is llama.cpp's own to do."""
    match index:
        case slice(start=None, step=None, stop=int(stop)) if stop >= 0:
            rows, count = own._rows, min(stop, own._rows.shape[0])
            cut = replace(rows, kept=min(count, rows.kept), shape=(count, *rows.shape[1:]))
            return LazyRows(cut, own._dtype, own._read)
        case _:
            return LazyTorchTensor._wrap_fn(torch.Tensor.__getitem__)(own, index)


# The metaclass puts its own over one that is defined within the class.
LazyRows.__getitem__ = _cut


def _is_padded(tensors: Any, dim: int = 0) -> bool:
    """Whether rows of zeros are put after lazy rows."""
    match tensors:
        case [LazyRows(), torch.Tensor() as zeros] if dim == 0:
            return not zeros.any()
        case _:
            return False


class RowArray(gguf.LazyChunkedTensor):  # type: ignore[misc]
    """What the converter writes where it left the rows of a tensor as they are.

    Args:
        rows: Which.
        shape: In bytes of the type, or in elements.
        dtype: Of `shape`.
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        super().__init__([], shape, dtype)
        self.rows = rows

    def quantize(self, qtype: Any) -> "RowArray":
        asked = super().quantize(qtype)
        return RowArray(self.rows, asked.shape, asked.dtype)
