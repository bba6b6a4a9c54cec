"""GGUF files before they are written: what each will hold, and the parts that it can be written in.

The format: metadata, then the tensors, each beginning at a multiple of the alignment.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import ggml
from exporter.converter import Converted
from exporter.quantizer import file_type, tensor_types

PART_WEIGHTS = 256 << 20
"""About how many weights a part has, where a file is written in parts: less than 1 GiB in most types."""


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

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.info.shape)


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

    @property
    def whole(self) -> "GgufPart":
        """All of it as one part."""
        return GgufPart(self, 0, self.tensors, 0, self.size)

    def parts(self, weights: int = PART_WEIGHTS) -> list["GgufPart"]:
        """The parts that it can be written in, by any number of writers; one after another they are the file.

        The same tensors are together in every quantization of a model.

        Args:
            weights: How many a part has at most, unless a single tensor has more.
        """
        groups: list[list[GgufTensor]] = [[]]
        for tensor in self.tensors:
            if groups[-1] and sum(other.weights for other in groups[-1]) + tensor.weights > weights:
                groups.append([])
            groups[-1].append(tensor)
        starts = [0, *(group[0].start for group in groups[1:])]
        ends = [*starts[1:], self.size]
        facts = enumerate(zip(groups, starts, ends, strict=True))
        return [GgufPart(self, number, tuple(group), start, end) for number, (group, start, end) in facts]


@dataclass(frozen=True)
class GgufPart:
    """Consecutive tensors of a GGUF file, with what is before the first of them and the padding after each."""

    file: GgufFile
    number: int
    """Its place among the parts, from 0"""
    tensors: tuple[GgufTensor, ...]
    begin: int
    """Where its bytes begin in the file"""
    end: int
    """Where those of the next part do"""

    @property
    def is_whole(self) -> bool:
        """Whether it is the file."""
        return self.size == self.file.size

    @property
    def name(self) -> str:
        """The file's own, or that of these bytes of it: of others, the name is another."""
        return self.file.name if self.is_whole else f"{self.file.name}.{self.begin}-{self.end}"

    @property
    def head(self) -> bytes:
        """What comes before its first tensor."""
        return self.file.head if self.number == 0 else b""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    @property
    def weights(self) -> int:
        """How many its tensors have."""
        return sum(tensor.weights for tensor in self.tensors)


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
