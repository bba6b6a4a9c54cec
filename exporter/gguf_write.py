"""The one pass over the merged tensors that writes GGUF files, or parts of them, of several types at once.

A tensor is quantized row by row, from the values that llama.cpp's converter would have stored in bfloat16; so it has
the very bytes of `convert_hf_to_gguf.py --outtype bf16` followed by `llama-quantize`. Only for f32 and f16, where that
detour could lose what the base has, there is none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dispatcher.errors import SourceError, VerificationFailed
from exporter import ggml
from exporter.blocks import FOLD_ELEMENTS, Block
from exporter.gemma import UNBOUNDED
from exporter.gguf_file import GgufPart, GgufTensor
from exporter.merge import Sink
from exporter.merged_tensors import MergedTensors
from exporter.pipeline import BUFFERS_AHEAD, Pipeline, worker_count

READERS = 8
"""Workers where the base is not on this machine: more than there are cores, since they wait for the network."""


class GgufOverflow(VerificationFailed):
    """A tensor type does not hold the values that it was to be made of."""

    code = "gguf_overflow"


_Put = int | GgufOverflow
"""How many bytes a file's rows have, or why it has none."""


@dataclass
class _Room:
    """What one worker has for itself."""

    raw: bytearray
    scratch: torch.Tensor


def write_parts(
    parts: Sequence[GgufPart],
    sinks: Sequence[Sink],
    merged: MergedTensors,
    on_overflow: Callable[[int, GgufOverflow], None] | None = None,
    *,
    memory_budget: int = 0,
) -> None:
    """Write parts of the same tensors in the same order, front to back, in one pass over the merged tensors.

    Args:
        parts: What to write; of several files, one of each.
        sinks: Where each goes.
        merged: The merged tensors.
        on_overflow: Told which part is given up, and why; the others are written all the same, unless it raises.
        memory_budget: Bytes that buffers may take, where there can be more workers than cores.

    Raises:
        GgufOverflow: A type does not hold the values, and there is no `on_overflow`.
        VerificationFailed: A merged value is not finite.
        Unavailable: The source changed while it was read (`source_changed`).
        Exception: Whatever the sinks raise.
    """
    written = [part.begin for part in parts]
    given_up: set[int] = set()

    def give_up(place: int, error: GgufOverflow) -> None:
        if on_overflow is None:
            raise error
        if place not in given_up:
            given_up.add(place)
            on_overflow(place, error)

    def write(place: int, data: memoryview) -> None:
        sinks[place].write(data)
        written[place] += len(data)

    def pad_to(place: int, start: int) -> None:
        write(place, memoryview(bytes(start - written[place])))

    def hand_on(targets: Sequence[GgufTensor], is_first: bool, buffer: bytearray, put: Sequence[_Put]) -> None:
        offset = 0
        for place, size in enumerate(put):
            if isinstance(size, GgufOverflow):
                give_up(place, size)
                continue
            if place not in given_up:
                if is_first:
                    pad_to(place, targets[place].start)
                write(place, memoryview(buffer)[offset : offset + size])
            offset += size

    for place, part in enumerate(parts):
        write(place, memoryview(part.head))
    room = partial(_room, merged.block_bytes, merged.scratch_elements)
    workers = _workers(len(parts), merged, memory_budget)
    with Pipeline(len(parts) * merged.block_bytes, room, workers=workers) as pipeline:
        for targets in zip(*(part.tensors for part in parts), strict=True):
            is_first = True
            for values in _values(targets[0].info, merged):
                pipeline.put(_nothing, partial(_fill, targets, values), partial(hand_on, targets, is_first))
                is_first = False
        pipeline.drain()
    for place, part in enumerate(parts):
        if place not in given_up:
            pad_to(place, part.end)


def _workers(files: int, merged: MergedTensors, memory_budget: int) -> int:
    """How many threads read, fold and quantize."""
    if merged.is_local:
        return worker_count()
    buffer = files * merged.block_bytes
    room = merged.block_bytes + 4 * merged.scratch_elements
    fitting = (memory_budget - BUFFERS_AHEAD * buffer) // (buffer + room)
    return max(1, min(max(READERS, worker_count()), fitting))


def _room(raw: int, scratch: int) -> _Room:
    return _Room(bytearray(raw), torch.empty(scratch, dtype=torch.float32))


def _values(info: Any, merged: MergedTensors) -> Iterator[Callable[[_Room], torch.Tensor]]:
    """The values of a tensor, flat, front to back, in blocks of whole rows, in the dtype that they have."""
    data = info.tensor
    if not hasattr(data, "rows"):
        yield from _values_of_array(data, int(info.dtype), info.shape)
        return
    rows = data.rows
    width = math.prod(rows.shape[1:])
    left = rows.kept * width
    if left:
        for block in merged.blocks(rows.source):
            elements = min(left, merged.elements(rows.source, block))
            yield partial(_of_block, merged, rows.source, block, elements)
            left -= elements
            if not left:
                break
    padding = math.prod(rows.shape) - rows.kept * width
    step = max(1, FOLD_ELEMENTS // max(1, width)) * width
    for start in range(0, padding, step):
        yield partial(_zeros, min(step, padding - start))


def _of_block(merged: MergedTensors, name: str, block: Block, elements: int, room: _Room) -> torch.Tensor:
    return merged.fill(name, block, room.raw, room.scratch)[:elements]


def _nothing(buffer: bytearray) -> None:
    """Workers read the base themselves: the converter's order is not that of the base's files."""


def _zeros(count: int, room: _Room) -> torch.Tensor:
    return torch.zeros(count)


def _values_of_array(data: Any, kind: int, shape: Sequence[int]) -> Iterator[Callable[[_Room], torch.Tensor]]:
    """What the converter computes itself: norms, of a block each, and a few others that are read whole here."""
    step = max(1, FOLD_ELEMENTS // shape[-1]) * shape[-1]
    if math.prod(shape) <= step:
        yield partial(_computed, data, kind)
        return
    for part in torch.split(_array(data, kind), step):
        yield partial(_known, part)


def _array(data: Any, kind: int) -> torch.Tensor:
    """All values of what the converter computes, flat."""
    import gguf

    array = gguf.LazyNumpyTensor.to_eager(data)
    values = torch.from_numpy(gguf.quants.dequantize(array, gguf.GGMLQuantizationType(kind))).flatten()
    return values.bfloat16() if kind == gguf.GGMLQuantizationType.BF16 else values


def _computed(data: Any, kind: int, room: _Room) -> torch.Tensor:
    return _array(data, kind)


def _known(values: torch.Tensor, room: _Room) -> torch.Tensor:
    return values


def _fill(
    targets: Sequence[GgufTensor], values: Callable[[_Room], torch.Tensor], buffer: bytearray, room: _Room
) -> list[_Put]:
    """Put the same rows into a buffer once for each file.

    Raises:
        SourceError: They are NaN or infinite (`model_not_finite`).
    """
    found, offset, put = values(room), 0, list[_Put]()
    # The sum of finite values may overflow, that of others never is finite; and it is told in a fraction of the time.
    if not found.sum(dtype=torch.float32).isfinite() and not found.isfinite().all():
        _refuse_not_finite(targets[0].name)
    for target in targets:
        try:
            size = _put(found, target, buffer, offset)
        except GgufOverflow as error:
            put.append(error)
        else:
            put.append(size)
            offset += size
    return put


def _refuse_not_finite(name: str) -> None:
    """Refuse a tensor that is not finite, but for bounds where infinity means none."""
    if not UNBOUNDED.search(name):
        raise SourceError(
            f"{name} holds NaN or infinity: the base, or the model that was trained, is damaged.",
            code="model_not_finite",
        )


def _put(values: torch.Tensor, target: GgufTensor, buffer: bytearray, offset: int) -> int:
    """Put rows into a buffer, in a file's type of the tensor; how many bytes.

    Raises:
        GgufOverflow: They do not fit.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    if int(target.info.dtype) == kinds.BF16 and target.kind not in (kinds.F32, kinds.F16):
        values = values.bfloat16()
    if (values.dtype, target.kind) in ((torch.bfloat16, kinds.BF16), (torch.float32, kinds.F32)):
        torch.frombuffer(buffer, dtype=values.dtype, count=values.numel(), offset=offset).copy_(values)
        size = values.numel() * values.element_size()
    else:
        size = ggml.quantize(target.kind, values.float().view(-1, target.width), buffer, offset)
    if not ggml.is_sound(target.kind, buffer, offset, size) and not UNBOUNDED.search(target.name):
        raise GgufOverflow(
            f"{target.name} has values up to {float(values.abs().max()):.3g}, which {kinds(target.kind).name} does not "
            "hold. Ask for another quantization, such as bf16 or q8_0."
        )
    return size
