"""The streaming engine: carries out a plan block by block, so that memory does not grow with the model."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO, Protocol

import torch

from exporter.adapter import Adapter
from exporter.blocks import Block, changed_blocks, copied_blocks, largest_block
from exporter.checkpoint import Tensor
from exporter.lora import Delta
from exporter.pairs import LoraPair
from exporter.pipeline import Pipeline, buffer_count, worker_count
from exporter.plan import OutputFile, OutputTensor, Plan

VERSION = "2"
"""Part of every artifact's version: raise it when the bytes that are written for a given plan change."""
BLOCK_BYTES = 4 * 1024 * 1024

OnBytes = Callable[[int], None]
"""Told of every block handed on, in bytes; whatever it raises stops the work."""


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
    largest = largest_change(planned.tensors)
    deltas: dict[str, Delta] = {}

    def put(block: Block) -> None:
        def fill(buffer: bytearray, scratch: torch.Tensor) -> Delta | None:
            return block.fill(descriptor, buffer, scratch, planned.name)

        def hand_on(buffer: bytearray, delta: Delta | None) -> None:
            sink.write(memoryview(buffer)[: block.nbytes])
            note(deltas, block.name, delta)
            on_bytes(block.nbytes)

        pipeline.put(fill, hand_on)

    sink.write(memoryview(planned.header))
    on_bytes(len(planned.header))
    with planned.source.open() as source, _pipeline(largest) as pipeline:
        descriptor = source.fileno()
        for block in _blocks(planned, adapter, source):
            put(block)
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
    return buffer_count() * _buffer_bytes(largest) + worker_count() * 2 * largest * 4 + 2 * pair


def largest_change(outputs: Iterable[OutputTensor]) -> int:
    """Elements of the largest block that is changed."""
    return max((largest_block(output.tensor) for output in outputs if output.change), default=0)


def _buffer_bytes(largest: int) -> int:
    return max(BLOCK_BYTES, largest * 4)


def _pipeline(largest: int) -> Pipeline[torch.Tensor]:
    return Pipeline(_buffer_bytes(largest), lambda: torch.empty(2 * largest, dtype=torch.float32))


def _blocks(planned: OutputFile, adapter: Adapter, source: BinaryIO) -> Iterator[Block]:
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
