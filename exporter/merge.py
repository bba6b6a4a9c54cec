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
from dataclasses import dataclass
from typing import Protocol

import torch

from exporter.adapter import Adapter, LoraPair
from exporter.checkpoint import Tensor
from exporter.lora import Factors, factors, fold_rows_, refuse_overflow, row_blocks
from exporter.plan import OutputFile
from exporter.saved import Saved
from exporter.tensors import TORCH_DTYPE, read_elements, read_into, read_tensor

VERSION = "1"
"""Part of every artifact's version: raise it when the bytes that this module writes for a given plan change."""
BLOCK_BYTES = 4 * 1024 * 1024
FOLD_ELEMENTS = 512 * 1024
"""About how many weights are folded at a time: their float32 copy should stay in the processor's cache."""

OnBytes = Callable[[int], None]
"""Told of every block handed on, in bytes; whatever it raises stops the work."""


class Sink(Protocol):
    """Where the bytes go; an artifact store's writer."""

    def write(self, data: memoryview) -> object: ...


@dataclass(frozen=True)
class _Copy:
    """`nbytes` of the source from `start`, as they are."""

    start: int
    nbytes: int


@dataclass(frozen=True)
class _Merge:
    tensor: Tensor
    pair: LoraPair


@dataclass(frozen=True)
class _Replace:
    tensor: Tensor
    saved: Saved


def write_merged(planned: OutputFile, adapter: Adapter, sink: Sink, on_bytes: OnBytes) -> None:
    """Write one output file of a plan, front to back.

    Raises:
        Unavailable: The source changed while it was read (`source_changed`).
        VerificationFailed: A merged value is not finite.
        Exception: Whatever the sink or `on_bytes` raise.
    """
    changed = [tensor for tensor in planned.source.tensors if tensor.name in planned.changes]
    largest = max((_largest_block(tensor) for tensor in changed), default=0)
    workers = fold_workers()
    free = deque(bytearray(max(BLOCK_BYTES, largest * 4)) for _ in range(workers + 2))
    under_way: deque[tuple[Future[None], bytearray, int]] = deque()

    def hand_on() -> None:
        ready, buffer, nbytes = under_way.popleft()
        ready.result()
        sink.write(memoryview(buffer)[:nbytes])
        free.append(buffer)
        on_bytes(nbytes)

    sink.write(memoryview(planned.header))
    on_bytes(len(planned.header))
    with planned.source.open() as source, _Workers(workers, largest) as pool:
        for block in _blocks(planned, adapter):
            if not free:
                hand_on()
            buffer = free.popleft()
            ready = pool.submit(block, source.fileno(), buffer, planned.name)
            under_way.append((ready, buffer, block.nbytes))
        while under_way:
            hand_on()


def fold_workers() -> int:
    """As many threads as there are cores; the one that writes mostly waits for the kernel."""
    return max(1, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Block:
    """`nbytes` of the source from `start`, and what to do to them once read."""

    start: int
    nbytes: int
    change: Callable[[bytearray, torch.Tensor], None] | None


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

    def submit(self, block: _Block, source: int, buffer: bytearray, name: str) -> Future[None]:
        return self._pool.submit(self._fill, block, source, buffer, name)

    def _fill(self, block: _Block, source: int, buffer: bytearray, name: str) -> None:
        read_into(source, memoryview(buffer)[: block.nbytes], block.start, name)
        if block.change is not None:
            block.change(buffer, self._scratch())

    def _scratch(self) -> torch.Tensor:
        if not hasattr(self._room, "scratch"):
            self._room.scratch = torch.empty(self._elements, dtype=torch.float32)
        scratch: torch.Tensor = self._room.scratch
        return scratch


def _blocks(planned: OutputFile, adapter: Adapter) -> Iterator[_Block]:
    for step in _steps(planned):
        match step:
            case _Copy():
                yield from _copied(step)
            case _Merge():
                yield from _folded(step, adapter)
            case _Replace():
                yield from _replaced(step, adapter)


def _steps(planned: OutputFile) -> Iterator[_Copy | _Merge | _Replace]:
    """The plan of one file with neighbouring copies joined: what is only copied has no tensor boundaries."""
    run: _Copy | None = None
    for tensor in planned.source.tensors:
        change = planned.changes.get(tensor.name)
        if change is None:
            run = _Copy(run.start, run.nbytes + tensor.nbytes) if run else _Copy(tensor.start, tensor.nbytes)
            continue
        if run:
            yield run
            run = None
        yield _Merge(tensor, change) if isinstance(change, LoraPair) else _Replace(tensor, change)
    if run:
        yield run


def _copied(step: _Copy) -> Iterator[_Block]:
    for offset in range(0, step.nbytes, BLOCK_BYTES):
        yield _Block(step.start + offset, min(BLOCK_BYTES, step.nbytes - offset), None)


def _largest_block(tensor: Tensor) -> int:
    rows, width = _rows(tensor)
    return max((count * width for _, count in row_blocks(rows, width, FOLD_ELEMENTS)), default=0)


def _rows(tensor: Tensor) -> tuple[int, int]:
    """Rows and width of a tensor; what is no matrix counts as one row per element of its first dimension."""
    rows = tensor.shape[0] if tensor.shape else 1
    return rows, math.prod(tensor.shape) // max(1, rows)


def _replaced(step: _Replace, adapter: Adapter) -> Iterator[_Block]:
    """The base's bytes with the adapter's own values put over them, rounded once to the base's dtype."""
    rows, width = _rows(step.tensor)
    dtype = TORCH_DTYPE[step.tensor.dtype]
    saved = step.saved
    places = None if saved.rows is None else {row: index for index, row in enumerate(saved.rows)}
    for first, count in row_blocks(rows, width, FOLD_ELEMENTS):

        def put(buffer: bytearray, scratch: torch.Tensor, first: int = first, count: int = count) -> None:
            values = torch.frombuffer(buffer, dtype=dtype, count=count * width)
            if places is None:
                values.copy_(read_elements(adapter.file, saved.tensor, first * width, count * width))
            else:
                for row in places.keys() & range(first, first + count):
                    new = read_elements(adapter.file, saved.tensor, places[row] * width, width)
                    values[(row - first) * width :][:width].copy_(new)
            refuse_overflow(values)

        yield _Block(step.tensor.start + first * width * dtype.itemsize, count * width * dtype.itemsize, put)


def _folded(step: _Merge, adapter: Adapter) -> Iterator[_Block]:
    rows, width = step.tensor.shape
    dtype = TORCH_DTYPE[step.tensor.dtype]
    row_bytes = width * dtype.itemsize
    pair = _factors(step.pair, adapter)
    for first, count in row_blocks(rows, width, FOLD_ELEMENTS):

        def fold(buffer: bytearray, scratch: torch.Tensor, first: int = first, count: int = count) -> None:
            weight = torch.frombuffer(buffer, dtype=dtype, count=count * width).view(count, width)
            fold_rows_(weight, first, pair, scratch)

        yield _Block(step.tensor.start + first * row_bytes, count * row_bytes, fold)


def _factors(pair: LoraPair, adapter: Adapter) -> Factors:
    magnitude = None if pair.magnitude is None else read_tensor(adapter.file, pair.magnitude)
    return factors(read_tensor(adapter.file, pair.a), read_tensor(adapter.file, pair.b), pair.scale, magnitude)
