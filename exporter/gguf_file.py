"""GGUF files: what each will hold, and the one pass over the merged tensors that writes several of them.

A tensor is quantized row by row, from the values that llama.cpp's converter would have stored in bfloat16; so it has
the very bytes of `convert_hf_to_gguf.py --outtype bf16` followed by `llama-quantize`. Only for f32 and f16, where that
detour could lose what the base has, there is none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import SourceError, VerificationFailed
from exporter import ggml
from exporter.blocks import FOLD_ELEMENTS, Block
from exporter.converter import Converted
from exporter.gemma import UNBOUNDED
from exporter.merge import Sink
from exporter.merged_tensors import MergedTensors
from exporter.pipeline import Pipeline, worker_count
from exporter.quantizer import file_type, tensor_types


class GgufOverflow(VerificationFailed):
    """A tensor type does not hold the values that it was to be made of."""

    code = "gguf_overflow"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file."""

    name: str
    kind: int
    """Its tensor type"""
    start: int
    """Where its bytes begin in the file"""
    nbytes: int
    info: Any
    """What the converter says of it; as in `Converted.tensors`"""

    @property
    def width(self) -> int:
        """Weights in a row."""
        return int(self.info.shape[-1])


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file to write."""

    name: str
    head: bytes
    """Everything before the first tensor"""
    tensors: tuple[GgufTensor, ...]

    @property
    def size(self) -> int:
        end = max((tensor.start + tensor.nbytes for tensor in self.tensors), default=len(self.head))
        return _padded(end)


def plan_quantized(converted: Converted, template: Path, name: str, quantization: str) -> GgufFile:
    """The file that llama.cpp's quantizer would make of the converter's.

    Args:
        converted: The language model, from the converter.
        template: Where a file may be made that it takes its decisions on: metadata, and a hole for the weights.
        name: The file's name.
        quantization: One of `dispatcher.contract.QUANTIZATIONS`.

    Raises:
        Unsupported: As `tensor_types`.
        OSError: The template cannot be written.
    """
    with ggml.Metadata(converted.writer) as metadata:
        size = metadata.write(template)
        kinds = tensor_types(template, size, len(converted.tensors), quantization)
        head, places = metadata.quantized(kinds, file_type(quantization))
    tensors = (
        GgufTensor(tensor, kind, len(head) + start, nbytes, converted.tensors[tensor])
        for (tensor, kind), (start, nbytes) in zip(kinds, places, strict=True)
    )
    return GgufFile(name, head, tuple(tensors))


def plan_as_converted(converted: Converted, template: Path, name: str) -> GgufFile:
    """The file as the converter has it; arguments and errors as of `plan_quantized`."""
    head = converted.head(template)
    head += bytes(_padded(len(head)) - len(head))
    start, tensors = len(head), []
    for tensor, info in converted.tensors.items():
        tensors.append(GgufTensor(tensor, int(info.dtype), start, info.nbytes, info))
        start = _padded(start + info.nbytes)
    return GgufFile(name, head, tuple(tensors))


def _padded(size: int) -> int:
    return -(-size // ggml.ALIGNMENT) * ggml.ALIGNMENT


_Put = int | GgufOverflow
"""How many bytes a file's rows have, or why it has none."""


@dataclass
class _Room:
    """What one worker has for itself."""

    raw: bytearray
    scratch: torch.Tensor


def write_files(
    files: Sequence[GgufFile],
    sinks: Sequence[Sink],
    merged: MergedTensors,
    on_overflow: Callable[[int, GgufOverflow], None] | None = None,
) -> None:
    """Write files of the same tensors in the same order, front to back, in one pass over the merged tensors.

    Args:
        files: What to write.
        sinks: Where each goes.
        merged: The merged tensors.
        on_overflow: Told which file is given up, and why; the others are written all the same, unless it raises.

    Raises:
        GgufOverflow: A type does not hold the values, and there is no `on_overflow`.
        VerificationFailed: A merged value is not finite.
        Unavailable: The source changed while it was read (`source_changed`).
        Exception: Whatever the sinks raise.
    """
    written = [0 for _ in files]
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

    for place, file in enumerate(files):
        write(place, memoryview(file.head))
    room = partial(_room, merged.block_bytes, merged.scratch_elements)
    with Pipeline(len(files) * merged.block_bytes, room, workers=worker_count()) as pipeline:
        for targets in zip(*(file.tensors for file in files), strict=True):
            is_first = True
            for values in _values(targets[0].info, merged):
                pipeline.put(_nothing, partial(_fill, targets, values), partial(hand_on, targets, is_first))
                is_first = False
        pipeline.drain()
    for place, file in enumerate(files):
        if place not in given_up:
            pad_to(place, file.size)


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
    """What the converter computed itself; it is of the kinds that are not cut into blocks, norms and the like."""
    import gguf

    array = gguf.LazyNumpyTensor.to_eager(data)
    values = torch.from_numpy(gguf.quants.dequantize(array, gguf.GGMLQuantizationType(kind))).flatten()
    if kind == gguf.GGMLQuantizationType.BF16:
        values = values.bfloat16()
    step = max(1, FOLD_ELEMENTS // shape[-1]) * shape[-1]
    for part in torch.split(values, step):
        yield partial(_known, part)


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
