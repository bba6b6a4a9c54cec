"""The streaming engine: carries out a plan block by block, so that memory does not grow with the model.

Worker threads read and fold blocks while the calling thread checksums and writes them in order; between them travel a
few buffers that are used over and over, because allocating (and first touching) memory is what a naive loop spends
its time on.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

import torch

from exporter.adapter import Adapter
from exporter.checkpoint import Tensor
from exporter.lora import (
    Delta,
    Factors,
    fold_rows_,
    put_,
    refuse_overflow,
    row_blocks,
    squares_by_column,
)
from exporter.pairs import AddedBias, LoraPair, matrices_of
from exporter.plan import OutputFile, OutputTensor, Plan
from exporter.saved import Saved
from exporter.tensors import TORCH_DTYPE, read_elements, read_into, read_tensor

VERSION = "2"
"""Part of every artifact's version: raise it when the bytes that this module writes for a given plan change."""
BLOCK_BYTES = 4 * 1024 * 1024
BUFFERS_AHEAD = 2
"""Blocks that wait to be written while every worker fills another."""
FOLD_ELEMENTS = 512 * 1024
"""About how many weights are folded at a time: their float32 copy should stay in the processor's cache."""

OnBytes = Callable[[int], None]
"""Told of every block handed on, in bytes; whatever it raises stops the work."""


class Sink(Protocol):
    """Where the bytes go; an artifact store's writer."""

    def write(self, data: memoryview) -> object: ...


Change = Callable[[bytearray, torch.Tensor], Delta]
"""Makes a block what it is to be: gets its bytes, and float32 room; says how far the values went."""


@dataclass(frozen=True)
class _Block:
    """`nbytes` of one output tensor, or of a run of copied ones."""

    name: str
    start: int | None
    """Where its bytes are in the source; None where nothing of the base remains"""
    nbytes: int
    change: Change | None


def write_merged(planned: OutputFile, adapter: Adapter, sink: Sink, on_bytes: OnBytes) -> dict[str, Delta]:
    """Write one output file of a plan, front to back.

    Returns:
        Of every changed tensor, how far it went from the base's.

    Raises:
        Unavailable: The source changed while it was read (`source_changed`).
        VerificationFailed: A merged value is not finite.
        Exception: Whatever the sink or `on_bytes` raise.
    """
    largest = _largest(planned)
    workers = fold_workers()
    free = deque(bytearray(_buffer_bytes(largest)) for _ in range(workers + BUFFERS_AHEAD))
    under_way: deque[tuple[Future[Delta | None], _Block, bytearray]] = deque()
    deltas: dict[str, Delta] = {}

    def hand_on() -> None:
        ready, block, buffer = under_way.popleft()
        delta = ready.result()
        sink.write(memoryview(buffer)[: block.nbytes])
        free.append(buffer)
        if delta is not None:
            deltas[block.name] = deltas[block.name] + delta if block.name in deltas else delta
        on_bytes(block.nbytes)

    sink.write(memoryview(planned.header))
    on_bytes(len(planned.header))
    with planned.source.open() as source, _Workers(workers, 2 * largest) as pool:
        for block in _blocks(planned, adapter, source):
            if not free:
                hand_on()
            buffer = free.popleft()
            under_way.append((pool.submit(block, source.fileno(), buffer, planned.name), block, buffer))
        while under_way:
            hand_on()
    return deltas


def memory_needed(plan: Plan) -> int:
    """Bytes that carrying out a plan takes beyond the interpreter and torch: buffers, float32 room, one pair."""
    largest = max(map(_largest, plan.files), default=0)
    changes = (output.change for output in plan.outputs if isinstance(output.change, LoraPair))
    pair = max((4 * math.prod(change.a.shape) + 4 * math.prod(change.b.shape) for change in changes), default=0)
    workers = fold_workers()
    return (workers + BUFFERS_AHEAD) * _buffer_bytes(largest) + workers * 2 * largest * 4 + 2 * pair


def _largest(planned: OutputFile) -> int:
    """Elements of the largest block that is changed."""
    return max((_largest_block(output.tensor) for output in planned.tensors if output.change), default=0)


def _buffer_bytes(largest: int) -> int:
    return max(BLOCK_BYTES, largest * 4)


def fold_workers() -> int:
    """As many threads as there are cores; the one that writes mostly waits for the kernel."""
    return max(1, os.cpu_count() or 1)


class _Workers:
    """Threads that fill buffers, each with float32 room of its own for folding."""

    def __init__(self, count: int, elements: int) -> None:
        self._elements = elements
        self._room = threading.local()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="fold")

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, block: _Block, source: int, buffer: bytearray, name: str) -> Future[Delta | None]:
        return self._pool.submit(self._fill, block, source, buffer, name)

    def _fill(self, block: _Block, source: int, buffer: bytearray, name: str) -> Delta | None:
        if block.start is not None:
            read_into(source, memoryview(buffer)[: block.nbytes], block.start, name)
        return block.change(buffer, self._scratch()) if block.change else None

    def _scratch(self) -> torch.Tensor:
        if not hasattr(self._room, "scratch"):
            self._room.scratch = torch.empty(self._elements, dtype=torch.float32)
        scratch: torch.Tensor = self._room.scratch
        return scratch


def _blocks(planned: OutputFile, adapter: Adapter, source: BinaryIO) -> Iterator[_Block]:
    """The file in blocks, neighbouring copies joined: what is only copied has no tensor boundaries."""
    run: Tensor | None = None
    for output in planned.tensors:
        if output.change is None and run is not None and output.source.start == run.start + run.nbytes:
            run = replace(run, nbytes=run.nbytes + output.source.nbytes)
            continue
        if run is not None:
            yield from _copied(run)
        run = output.source if output.change is None else None
        match output.change:
            case LoraPair():
                yield from _folded(output, output.change, adapter, source)
            case Saved():
                yield from _replaced(output, output.change, adapter)
            case AddedBias():
                yield _added(output, output.change, adapter)
    if run is not None:
        yield from _copied(run)


def _copied(run: Tensor) -> Iterator[_Block]:
    for offset in range(0, run.nbytes, BLOCK_BYTES):
        yield _Block(run.name, run.start + offset, min(BLOCK_BYTES, run.nbytes - offset), None)


def _largest_block(tensor: Tensor) -> int:
    matrices, rows, width = matrices_in(tensor)
    blocks = row_blocks(rows, width, FOLD_ELEMENTS) + row_blocks(matrices * rows, width, FOLD_ELEMENTS)
    return max((count * width for _, count in blocks), default=0)


def matrices_in(tensor: Tensor) -> tuple[int, int, int]:
    """How many matrices a tensor is, of how many rows, and their width; of fewer dimensions, one matrix."""
    count = math.prod(tensor.shape[:-2])
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else math.prod(tensor.shape)
    return count, rows, math.prod(tensor.shape) // max(1, count * rows)


def _replaced(output: OutputTensor, saved: Saved, adapter: Adapter) -> Iterator[_Block]:
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


def _block(output: OutputTensor, first: int, count: int, change: Change) -> _Block:
    """A block of `count` elements from the flat index `first` on."""
    size = TORCH_DTYPE[output.tensor.dtype].itemsize
    start = None if output.resized else output.source.start + first * size
    return _Block(output.tensor.name, start, count * size, change)


def _added(output: OutputTensor, bias: AddedBias, adapter: Adapter) -> _Block:
    count = math.prod(output.tensor.shape)

    def add(buffer: bytearray, scratch: torch.Tensor) -> Delta:
        values = torch.frombuffer(buffer, dtype=TORCH_DTYPE[output.tensor.dtype], count=count)
        before = values.float()
        after = before + read_tensor(adapter.file, bias.tensor).float() * bias.scale
        refuse_overflow(after)
        return put_(values, before, after)

    return _block(output, 0, count, add)


def _folded(output: OutputTensor, pair: LoraPair, adapter: Adapter, source: BinaryIO) -> Iterator[_Block]:
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
    output: OutputTensor, matrix: Factors, pair: LoraPair, adapter: Adapter, source: BinaryIO
) -> torch.Tensor:
    """The length of each column of what is merged: [width], float32; one more pass over the base's values."""
    _, rows, width = matrices_in(output.tensor)
    dtype = TORCH_DTYPE[output.tensor.dtype]
    squares = torch.zeros(width, dtype=torch.float64)
    for first, count in row_blocks(rows, width, FOLD_ELEMENTS):
        values = own_base(pair, adapter, first, count, width)
        if values is None:
            data = bytearray(count * width * dtype.itemsize)
            start = output.source.start + first * width * dtype.itemsize
            read_into(source.fileno(), memoryview(data), start, output.source.name)
            values = torch.frombuffer(data, dtype=dtype).view(count, width)
        squares += squares_by_column(values, first, matrix)
    return squares.sqrt().float()
