"""The streaming engine: carries out a plan block by block, so that memory does not grow with the model."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Protocol, Self

import torch

from exporter.adapter import Adapter
from exporter.blocks import Block, changed_blocks, copied_blocks, largest_block
from exporter.byte_source import ByteReader, ByteStream
from exporter.checkpoint import Tensor
from exporter.lora import Delta
from exporter.pairs import LoraPair
from exporter.pipeline import BUFFERS_AHEAD, Pipeline, worker_count
from exporter.plan import OutputFile, OutputTensor, Plan

VERSION = "2"
"""Part of every artifact's version: raise it when the bytes that are written for a given plan change."""
BLOCK_BYTES = 4 * 1024 * 1024

OnBytes = Callable[[int], None]
"""Told of every block handed on, in bytes; whatever it raises stops the work. Called in a thread of its own."""


class Sink(Protocol):
    """Where the bytes go; an artifact store's writer."""

    def write(self, data: memoryview) -> object: ...


def write_merged(planned: OutputFile, adapter: Adapter, sink: Sink, on_bytes: OnBytes) -> dict[str, Delta]:
    """Write one output file of a plan, front to back.

    Returns:
        Of every changed tensor, how far it went from the base's.

    Raises:
        Unavailable: The source changed while it was read (`source_changed`).
        VerificationFailed: A merged value is not finite.
        Exception: Whatever the sink or `on_bytes` raise.
    """
    deltas: dict[str, Delta] = {}

    def hand_on(block: Block, buffer: bytearray, delta: Delta | None) -> None:
        sink.write(memoryview(buffer)[: block.nbytes])
        note(deltas, block.name, delta)
        on_bytes(block.nbytes)

    sink.write(memoryview(planned.header))
    on_bytes(len(planned.header))
    largest = largest_change(planned.tensors)
    with planned.source.open(whole=True) as source, _InOrder(source, planned) as base, _pipeline(largest) as pipeline:
        for block in _blocks(planned, adapter, source):
            pipeline.put(partial(base.read, block), block.make, partial(hand_on, block))
        pipeline.drain()
    return deltas


def note(deltas: dict[str, Delta], name: str, delta: Delta | None) -> None:
    """Add what one block of a tensor changed to what is known of the tensor."""
    if delta is not None:
        deltas[name] = deltas[name] + delta if name in deltas else delta


def memory_needed(plan: Plan) -> int:
    """Bytes that carrying out a plan takes beyond the interpreter and torch: buffers, float32 room, one pair."""
    largest = largest_change(plan.outputs)
    changes = (output.change for output in plan.outputs if isinstance(output.change, LoraPair))
    pair = max((4 * math.prod(change.a.shape) + 4 * math.prod(change.b.shape) for change in changes), default=0)
    buffers = worker_count() + BUFFERS_AHEAD
    return buffers * _buffer_bytes(largest) + worker_count() * 2 * largest * 4 + 2 * pair


def largest_change(outputs: Iterable[OutputTensor]) -> int:
    """Elements of the largest block that is changed."""
    return max((largest_block(output.tensor) for output in outputs if output.change), default=0)


def _buffer_bytes(largest: int) -> int:
    return max(BLOCK_BYTES, largest * 4)


def _pipeline(largest: int) -> Pipeline[torch.Tensor]:
    room = partial(torch.empty, 2 * largest, dtype=torch.float32)
    return Pipeline(_buffer_bytes(largest), room, workers=worker_count())


class _InOrder:
    """Reads what the blocks of a file begin with, in their order: neighbours in one stream.

    Args:
        source: The base's file.
        planned: What is made of it.
    """

    def __init__(self, source: ByteReader, planned: OutputFile) -> None:
        self._source = source
        self._runs = iter(_runs(planned))
        self._offset = self._stop = 0
        self._stream: ByteStream | None = None
        self._stack = ExitStack()

    def read(self, block: Block, buffer: bytearray) -> None:
        """Fill a buffer with the bytes that the next block begins with, if it begins with any."""
        if block.start is None or block.nbytes == 0:
            return
        if self._stream is None or self._offset == self._stop:
            self._stack.close()
            self._offset, self._stop = next(self._runs)
            self._stream = self._stack.enter_context(self._source.stream(self._offset, self._stop))
        self._stream.read_into(memoryview(buffer)[: block.nbytes])
        self._offset += block.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _runs(planned: OutputFile) -> list[tuple[int, int]]:
    """Where the base's bytes that a file begins with start and stop, neighbours joined, in the file's order."""
    runs: list[tuple[int, int]] = []
    for output in planned.tensors:
        if output.resized or output.source.nbytes == 0:
            continue
        start, stop = output.source.start, output.source.start + output.source.nbytes
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    return runs


def _blocks(planned: OutputFile, adapter: Adapter, source: ByteReader) -> Iterator[Block]:
    """The file in blocks, neighbouring copies joined: what is only copied has no tensor boundaries."""
    run: Tensor | None = None
    for output in planned.tensors:
        if output.change is None and run is not None and output.source.start == run.start + run.nbytes:
            run = replace(run, nbytes=run.nbytes + output.source.nbytes)
            continue
        if run is not None:
            yield from copied_blocks(run, BLOCK_BYTES)
        run = output.source if output.change is None else None
        yield from changed_blocks(output, adapter, source)
    if run is not None:
        yield from copied_blocks(run, BLOCK_BYTES)
