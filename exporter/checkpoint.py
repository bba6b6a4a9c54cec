"""Safetensors checkpoints as plain data: which tensor lies where. Knows bytes, not LoRA.

The format: 8 bytes little-endian header length N, N bytes of JSON, then the data; offsets are relative to the data,
ascending, without overlap or hole. Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dispatcher.errors import SourceError
from exporter.byte_source import ByteReader, ByteSource, LocalFile, read_bytes
from exporter.documents import parse_json_object, read_bounded

MAX_HEADER_BYTES = 32_000_000
"""Ten times the header of any model; the safetensors library takes 100 MB, of which Python's reader makes gigabytes."""
MAX_TENSORS = 200_000
"""Of a model, whether in one file or in many: a hundred times as many as any Gemma has"""
MAX_EMPTY = 1_000_000
"""The longest dimension of a tensor without elements: of others, the bytes of the file are the limit."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 32_000_000
MAX_NAME = 1000
"""Characters of a tensor's name: ten times the longest of any Gemma."""
ITEM_SIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes per element of each dtype name."""

ReadAt = Callable[[int, int], bytes]
"""Reads (offset, length) of one file."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `start` is its absolute byte offset there, `nbytes` its length."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its tensors in the order of their bytes."""

    source: ByteSource
    """The version whose header was read"""
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]

    def open(self, *, whole: bool = False) -> ByteReader:
        """Open the very version whose header was read; arguments and errors as of `ByteSource.open`."""
        return self.source.open(whole=whole)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        return self.source.size


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: one, or several with an index (`index` holds its bytes, to be kept as they are)."""

    files: tuple[TensorFile, ...]
    index: bytes | None

    def tensors(self) -> dict[str, tuple[TensorFile, Tensor]]:
        """Every tensor by name, with the file that holds it."""
        return {tensor.name: (file, tensor) for file in self.files for tensor in file.tensors}


def read_tensor_file(path: Path) -> TensorFile:
    """As `tensor_file`, of a file of this machine.

    Raises:
        SourceError, Unavailable: As `tensor_file`.
        OSError: It cannot be read.
    """
    return tensor_file(LocalFile.of(path))


def tensor_file(source: ByteSource) -> TensorFile:
    """Read and check the header of one safetensors file.

    Raises:
        SourceError: `safetensors_truncated` when the file ends too early, `safetensors_corrupt` when the header
            does not describe it.
        Unavailable: As `ByteSource.open` and `ByteReader.read_into`.
    """
    with source.open() as reader:
        tensors, metadata = parse_header(partial(read_bytes, reader), source.size, source.name)
    return TensorFile(source, tensors, metadata)


def parse_header(read_at: ReadAt, size: int, name: str) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    """Tensors (in byte order) and metadata of a safetensors file of `size` bytes, checked against each other.

    Raises:
        SourceError: As `read_tensor_file`.
    """
    if size < 8:
        raise _truncated(name, f"it has {size} bytes, a header needs 8")
    length = int.from_bytes(read_at(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(name, f"its header claims {length} bytes, {MAX_HEADER_BYTES} are the most")
    if 8 + length > size:
        raise _truncated(name, f"its header claims {length} bytes, the file has {size}")
    header = _header_object(read_at(8, length), name)
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise _corrupt(name, f"it has {len(header)} tensors, {MAX_TENSORS} are the most")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(name, "__metadata__ must map text to text")
    data_start = 8 + length
    tensors = sorted((_tensor(key, entry, data_start, name) for key, entry in header.items()), key=_byte_order)
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps the one before" if tensor.start < end else "leaves a hole before it"
            raise _corrupt(name, f"tensor {tensor.name!r} {kind}")
        end = tensor.start + tensor.nbytes
    if end > size:
        raise _truncated(name, f"its tensors end at byte {end}, the file has {size}: it was cut short")
    if end < size:
        raise _corrupt(name, f"{size - end} bytes follow the last tensor")
    return tuple(tensors), metadata


def _byte_order(tensor: Tensor) -> tuple[int, int]:
    return tensor.start, tensor.nbytes


def _header_object(raw: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_json_object(raw, max_marks=16 * MAX_TENSORS)
    except ValueError as error:
        raise _corrupt(name, f"its header cannot be read: {str(error)[:200]}") from error


def _tensor(key: str, entry: Any, data_start: int, name: str) -> Tensor:
    where = f"tensor {key[:200]!r}"
    if len(key) > MAX_NAME:
        raise _corrupt(name, f"{where}… has a name of {len(key)} characters, {MAX_NAME} are expected at most")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(name, f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise _corrupt(name, f"{where} has dtype {str(dtype)[:40]!r}, known are {', '.join(ITEM_SIZE)}")
    if not isinstance(shape, list) or not all(_is_size(item) for item in shape) or len(shape) > 16:
        raise _corrupt(name, f"{where} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(item) for item in offsets):
        raise _corrupt(name, f"{where} has no valid data_offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_SIZE[dtype]
    if nbytes == 0 and max(shape) > MAX_EMPTY:
        raise _corrupt(name, f"{where} of shape {shape} has no elements, and a dimension of more than {MAX_EMPTY}")
    if end - begin != nbytes:
        raise _corrupt(name, f"{where} of shape {shape} and dtype {dtype} needs {nbytes} bytes, it has {end - begin}")
    return Tensor(key, dtype, tuple(shape), data_start + begin, nbytes)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _truncated(name: str, what: str) -> SourceError:
    return SourceError(f"{name} is incomplete: {what}. Upload or download it again.", code="safetensors_truncated")


def _corrupt(name: str, what: str) -> SourceError:
    return SourceError(f"{name} is not a valid safetensors file: {what}.", code="safetensors_corrupt")


def open_checkpoint(directory: Path, weights: Mapping[str, ByteSource] | None = None) -> Checkpoint:
    """Read the headers of a model: of `model.safetensors`, or of the shards that its index names.

    Args:
        directory: Where the model lies.
        weights: Where its safetensors files are, by name, if it is not there; the index still is.

    Raises:
        SourceError: `base_missing` without weights, `base_pickle_only`, `base_index_invalid`, or as `tensor_file`.
        Unavailable: As `tensor_file`.
    """
    if weights is None:
        weights = {path.name: LocalFile.of(path) for path in directory.glob("*.safetensors") if path.is_file()}
    if SINGLE_NAME in weights:  # first, as transformers does where both are there
        return Checkpoint((tensor_file(weights[SINGLE_NAME]),), None)
    if (directory / INDEX_NAME).is_file():
        return _open_sharded(directory / INDEX_NAME, weights)
    if any(directory.glob("*.bin")):
        raise SourceError(
            f"{directory} holds only pickled weights (*.bin), which are never loaded. Save the model as safetensors.",
            code="base_pickle_only",
        )
    raise SourceError(
        f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: it holds no model.", code="base_missing"
    )


def _open_sharded(index_path: Path, weights: Mapping[str, ByteSource]) -> Checkpoint:
    try:
        content = read_bounded(index_path, limit=MAX_INDEX_BYTES)
        index = parse_json_object(content)
    except ValueError as error:
        raise bad_index(str(error)[:200], "base") from error
    weight_map = weight_map_of(index, "base")
    files: list[TensorFile] = []
    for name in sorted(set(weight_map.values())):
        if name not in weights:
            raise SourceError(f"{name[:200]!r} is missing, but {INDEX_NAME} names it.", code="base_missing")
        files.append(tensor_file(weights[name]))
        refuse_too_many(sum(len(file.tensors) for file in files), "base")
    refuse_astray(weight_map, {file.name: file.tensors for file in files}, "base")
    return Checkpoint(tuple(files), content)


def weight_map_of(index: Mapping[str, Any], role: str) -> dict[str, str]:
    """Which file, beside it, an index says that each tensor is in.

    Raises:
        SourceError: `{role}_index_invalid`.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise bad_index("weight_map must map tensor names to file names", role)
    refuse_too_many(len(weight_map), role)
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise bad_index(f"{name[:200]!r} is not the name of a safetensors file beside it", role)
    return weight_map


def refuse_too_many(count: int, role: str) -> None:
    """Refuse a model of more tensors than are read.

    Raises:
        SourceError: `{role}_index_invalid`.
    """
    if count > MAX_TENSORS:
        raise bad_index(f"it has {count} tensors or more, {MAX_TENSORS} are the most", role)


def refuse_astray(weight_map: Mapping[str, str], files: Mapping[str, Sequence[Tensor]], role: str) -> None:
    """Refuse an index that contradicts the headers of its files.

    Raises:
        SourceError: `{role}_index_invalid`.
    """
    found = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    if len(found) != sum(map(len, files.values())):
        raise bad_index("a tensor occurs in two of its files", role)
    astray = sorted(name for name, file in weight_map.items() if found.get(name) != file)
    if astray:
        raise bad_index(f"{len(astray)} tensors are not in the file it names, first {astray[0][:200]!r}", role)


def bad_index(what: str, role: str) -> SourceError:
    """What is raised when the index of a `role` (the base, or a whole model) is none."""
    return SourceError(f"{INDEX_NAME} cannot be used: {what}.", code=f"{role}_index_invalid")


def header_bytes(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> bytes:
    """The 8-byte length and JSON header of a file that holds `tensors` one after the other, in this order.

    Padded with spaces to a multiple of 8, as the safetensors library does, so that data starts aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
