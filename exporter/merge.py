"""The streaming engine: carries out a plan block by block, so that memory does not grow with the model.

One thread reads and folds while another checksums and writes; between them travel a few buffers that are used over
and over, because allocating (and first touching) memory is what a naive loop spends its time on.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from exporter.adapter import Adapter, LoraPair
from exporter.checkpoint import Tensor
from exporter.lora import fold_rows_, row_blocks
from exporter.plan import OutputFile
from exporter.tensors import TORCH_DTYPE, read_into, read_tensor

VERSION = "1"
"""Part of every artifact's version: raise it when the bytes that this module writes for a given plan change."""
BLOCK_BYTES = 4 * 1024 * 1024
BLOCKS = 3
FOLD_ELEMENTS = 1024 * 1024
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


def write_merged(planned: OutputFile, adapter: Adapter, sink: Sink, on_bytes: OnBytes) -> None:
    """Write one output file of a plan, front to back.

    Raises:
        SourceError: The source changed while it was read.
        VerificationFailed: A merged value is not finite.
        Exception: Whatever the sink or `on_bytes` raise.
    """
    merged = [tensor for tensor in planned.source.tensors if tensor.name in planned.merges]
    largest = max((_largest_block(tensor) for tensor in merged), default=0)
    scratch = torch.empty(largest, dtype=torch.float32)
    with (
        planned.source.path.open("rb", buffering=0) as source,
        _WriteBehind(sink, max(BLOCK_BYTES, largest * 4)) as pipe,
    ):
        pipe.write(planned.header)
        on_bytes(len(planned.header))
        for step in _steps(planned):
            blocks = _copied(step) if isinstance(step, _Copy) else _folded(step, adapter, scratch)
            for start, nbytes, change in blocks:
                block = pipe.take()
                view = memoryview(block)[:nbytes]
                read_into(source.fileno(), view, start, planned.name)
                if change is not None:
                    change(block)
                pipe.give(block, nbytes)
                on_bytes(nbytes)


def _steps(planned: OutputFile) -> Iterator[_Copy | _Merge]:
    """The plan of one file with neighbouring copies joined: what is only copied has no tensor boundaries."""
    run: _Copy | None = None
    for tensor in planned.source.tensors:
        pair = planned.merges.get(tensor.name)
        if pair is None:
            run = _Copy(run.start, run.nbytes + tensor.nbytes) if run else _Copy(tensor.start, tensor.nbytes)
            continue
        if run:
            yield run
            run = None
        yield _Merge(tensor, pair)
    if run:
        yield run


_Block = tuple[int, int, Callable[[bytearray], None] | None]
"""Where a block starts in the source, its bytes, and what to do to it once read."""


def _copied(step: _Copy) -> Iterator[_Block]:
    for offset in range(0, step.nbytes, BLOCK_BYTES):
        yield step.start + offset, min(BLOCK_BYTES, step.nbytes - offset), None


def _largest_block(tensor: Tensor) -> int:
    rows, width = tensor.shape
    return max((count * width for _, count in row_blocks(rows, width, FOLD_ELEMENTS)), default=0)


def _folded(step: _Merge, adapter: Adapter, scratch: torch.Tensor) -> Iterator[_Block]:
    rows, width = step.tensor.shape
    dtype = TORCH_DTYPE[step.tensor.dtype]
    row_bytes = width * dtype.itemsize
    a = read_tensor(adapter.file, step.pair.a).float()
    b = read_tensor(adapter.file, step.pair.b).float()
    for first, count in row_blocks(rows, width, FOLD_ELEMENTS):

        def fold(block: bytearray, first: int = first, count: int = count) -> None:
            weight = torch.frombuffer(block, dtype=dtype, count=count * width).view(count, width)
            fold_rows_(weight, a, b[first : first + count], step.pair.scale, scratch)

        yield step.tensor.start + first * row_bytes, count * row_bytes, fold


class _WriteBehind:
    """A thread that writes blocks in the order they are given, and hands the buffers back."""

    def __init__(self, sink: Sink, block_bytes: int) -> None:
        self._sink = sink
        self._full: queue.SimpleQueue[tuple[bytearray, int] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(BLOCKS):
            self._free.put(bytearray(block_bytes))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def __enter__(self) -> "_WriteBehind":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._full.put(None)
        self._thread.join()
        if kind is None:
            self._raise_error()

    def write(self, data: bytes) -> None:
        """Hand on bytes of any length, copied through the buffers."""
        for offset in range(0, len(data), BLOCK_BYTES):
            piece = data[offset : offset + BLOCK_BYTES]
            block = self.take()
            block[: len(piece)] = piece
            self.give(block, len(piece))

    def take(self) -> bytearray:
        """A buffer to fill; waits until one is free."""
        block = self._free.get()
        self._raise_error()
        return block

    def give(self, block: bytearray, nbytes: int) -> None:
        self._full.put((block, nbytes))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._full.get()) is not None:
            block, nbytes = item
            if self._error is None:
                try:
                    self._sink.write(memoryview(block)[:nbytes])
                except BaseException as error:  # noqa: BLE001  # carried over to the thread that feeds this one
                    self._error = error
            self._free.put(block)


def compute_threads() -> int:
    """Threads for the fold: the write-behind thread needs a core of its own where there is more than one."""
    return max(1, (os.cpu_count() or 1) - 1)
