"""The blocks that a merged tensor is made of: which bytes of the base each begins with, and what is done to them.

A block is of whole rows of one tensor and small enough that its float32 copy stays in the processor's cache; so memory
does not grow with the model, and blocks can be made in any order, side by side.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from exporter.adapter import Adapter
from exporter.byte_source import ByteReader
from exporter.checkpoint import Tensor
from exporter.lora import Delta, Factors, fold_rows_, put_, refuse_overflow, row_blocks, squares_by_column
from exporter.pairs import AddedBias, LoraPair, matrices_of
from exporter.plan import OutputTensor
from exporter.saved import Saved
from exporter.tensors import TORCH_DTYPE, read_elements, read_tensor

FOLD_ELEMENTS = 512 * 1024
"""About how many weights are folded at a time: their float32 copy should stay in the processor's cache."""

Change = Callable[[bytearray, torch.Tensor], Delta]
"""Makes a block what it is to be: gets its bytes, and float32 room; says how far the values went."""


@dataclass(frozen=True)
class Block:
    """`nbytes` of one output tensor, or of a run of copied ones."""

    name: str
    start: int | None
    """Where its bytes are in the source; None where nothing of the base remains"""
    nbytes: int
    change: Change | None

    def make(self, buffer: bytearray, scratch: torch.Tensor) -> Delta | None:
        """Make it of the base's bytes.

        Args:
            buffer: Begins with those bytes, and is given the block's.
            scratch: Float32 room, twice the elements of the largest changed block.

        Returns:
            How far the values went from the base's; None where they did not go.

        Raises:
            VerificationFailed: A merged value is not finite.
        """
        return self.change(buffer, scratch) if self.change else None


def changed_blocks(output: OutputTensor, adapter: Adapter, source: ByteReader) -> Iterator[Block]:
    """A tensor that the adapter changes, front to back; nothing for one that it does not."""
    match output.change:
        case LoraPair():
            yield from _folded(output, output.change, adapter, source)
        case Saved():
            yield from _replaced(output, output.change, adapter)
        case AddedBias():
            yield _added(output, output.change, adapter)


def copied_blocks(tensor: Tensor, size: int) -> Iterator[Block]:
    """The base's bytes as they are, at most `size` at a time."""
    for offset in range(0, tensor.nbytes, size):
        yield Block(tensor.name, tensor.start + offset, min(size, tensor.nbytes - offset), None)


def largest_block(tensor: Tensor) -> int:
    """Elements of the largest block of a changed tensor."""
    matrices, rows, width = matrices_in(tensor)
    blocks = row_blocks(rows, width, FOLD_ELEMENTS) + row_blocks(matrices * rows, width, FOLD_ELEMENTS)
    return max((count * width for _, count in blocks), default=0)


def matrices_in(tensor: Tensor) -> tuple[int, int, int]:
    """How many matrices a tensor is, of how many rows, and their width; of fewer dimensions, one matrix."""
    count = math.prod(tensor.shape[:-2])
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else math.prod(tensor.shape)
    return count, rows, math.prod(tensor.shape) // max(1, count * rows)


def _replaced(output: OutputTensor, saved: Saved, adapter: Adapter) -> Iterator[Block]:
    """The base's bytes with the adapter's own values put over them, rounded once to the base's dtype."""
    matrices, rows, width = matrices_in(output.tensor)
    dtype = TORCH_DTYPE[output.tensor.dtype]
    places = None if saved.rows is None else {row: index for index, row in enumerate(saved.rows)}
    for first, count in row_blocks(matrices * rows, width, FOLD_ELEMENTS):

        def put(buffer: bytearray, scratch: torch.Tensor, first: int = first, count: int = count) -> Delta:
            values = torch.frombuffer(buffer, dtype=dtype, count=count * width)
            before = values.float() if not output.resized else torch.zeros(count * width)
            if places is None:
                after = read_elements(adapter.file, saved.tensor, first * width, count * width).float()
            else:
                after = before.clone()
                for row in places.keys() & range(first, first + count):
                    new = read_elements(adapter.file, saved.tensor, places[row] * width, width)
                    after[(row - first) * width :][:width].copy_(new)
            return put_(values, before, after)

        yield _block(output, first * width, count * width, put)


def _block(output: OutputTensor, first: int, count: int, change: Change) -> Block:
    """A block of `count` elements from the flat index `first` on."""
    size = TORCH_DTYPE[output.tensor.dtype].itemsize
    start = None if output.resized else output.source.start + first * size
    return Block(output.tensor.name, start, count * size, change)


def _added(output: OutputTensor, bias: AddedBias, adapter: Adapter) -> Block:
    count = math.prod(output.tensor.shape)

    def add(buffer: bytearray, scratch: torch.Tensor) -> Delta:
        values = torch.frombuffer(buffer, dtype=TORCH_DTYPE[output.tensor.dtype], count=count)
        before = values.float()
        after = before + read_tensor(adapter.file, bias.tensor).float() * bias.scale
        refuse_overflow(after)
        return put_(values, before, after)

    return _block(output, 0, count, add)


def _folded(output: OutputTensor, pair: LoraPair, adapter: Adapter, source: ByteReader) -> Iterator[Block]:
    tensor = output.tensor
    _, rows, width = matrices_in(tensor)
    dtype = TORCH_DTYPE[tensor.dtype]
    for number, matrix in enumerate(matrices_of(pair, adapter.file, tensor.shape)):
        begin = number * rows * width
        if matrix.columns is not None:
            matrix = replace(matrix, columns=matrix.columns / column_norms(output, matrix, pair, adapter, source))
        for first, count in row_blocks(rows, width, FOLD_ELEMENTS):

            def fold(
                buffer: bytearray,
                scratch: torch.Tensor,
                first: int = first,
                count: int = count,
                matrix: Factors = matrix,
            ) -> Delta:
                weight = torch.frombuffer(buffer, dtype=dtype, count=count * width).view(count, width)
                base = own_base(pair, adapter, first, count, width)
                return fold_rows_(weight, first, matrix, scratch, base=base)

            yield _block(output, begin + first * width, count * width, fold)


def own_base(pair: LoraPair, adapter: Adapter, first: int, count: int, width: int) -> torch.Tensor | None:
    """Rows that the adapter brings to be merged into: [count, width]; None where it merges into the base's."""
    if pair.base is None:
        return None
    return read_elements(adapter.file, pair.base, first * width, count * width).view(count, width)


def column_norms(
    output: OutputTensor, matrix: Factors, pair: LoraPair, adapter: Adapter, source: ByteReader
) -> torch.Tensor:
    """The length of each column of what is merged: [width], float32; one more pass over the base's values."""
    _, rows, width = matrices_in(output.tensor)
    dtype = TORCH_DTYPE[output.tensor.dtype]
    squares = torch.zeros(width, dtype=torch.float64)
    start = output.source.start
    with source.stream(start, start + rows * width * dtype.itemsize) as stream:
        for first, count in row_blocks(rows, width, FOLD_ELEMENTS):
            values = own_base(pair, adapter, first, count, width)
            if values is None:
                data = bytearray(count * width * dtype.itemsize)
                stream.read_into(memoryview(data))
                values = torch.frombuffer(data, dtype=dtype).view(count, width)
            squares += squares_by_column(values, first, matrix)
    return squares.sqrt().float()
