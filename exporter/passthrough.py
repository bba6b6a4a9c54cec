"""The engine for a training result that is a whole model: it is published as it is, once it proves sound.

There is nothing to merge, and no base is read, unless a file that a user needs was not saved with the model.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.crc32c import Crc32c
from dispatcher.errors import NotFound, SourceError, VerificationFailed
from exporter.attempt import Attempt
from exporter.byte_source import changed
from exporter.checkpoint import INDEX_NAME, ITEM_SIZE, SINGLE_NAME, Tensor
from exporter.full_model import CONFIG_NAME, FullModel, files_from_base, refuse_quantized, weights_of
from exporter.gemma import UNBOUNDED
from exporter.lease import Report
from exporter.making import WRITE_TO, Made
from exporter.quantized import config_bytes, without_quantization
from exporter.sidefiles import publish_copy
from exporter.sources import Base
from exporter.tensors import TORCH_DTYPE, is_sound
from exporter.verify import vanished

NAME = "passthrough"
VERSION = "1"
"""Part of every such artifact's version: raise it when the bytes that this module writes for given files change."""
BLOCK_BYTES = 8 << 20


def pass_through(attempt: Attempt, model: FullModel, base: Base | None, report: Report) -> Made:
    """Publish what a user loads of a whole model: weights, index, config and side files, byte for byte.

    Nothing else that lies there: no pickle, no optimizer's state, no checkpoint. The config is changed only where it
    speaks of a quantization that the weights do not have, so that no library could load it.

    Args:
        attempt: Where to.
        model: The model.
        base: What `base_of_full_model` gave.
        report: Told of the fraction; what it raises stops the work.

    Raises:
        SourceError: `model_weights_missing`, `model_pickle_only`, `model_index_invalid`, `model_quantized`,
            `model_not_finite`, or as `read_tensor_file`.
        VerificationFailed: What was written is not what was read (`copy_differs`).
        Unavailable: The model changed meanwhile (`source_changed`).
    """
    torch.set_num_threads(1)  # one keeps up with any disk
    weights = weights_of(model)
    refuse_quantized(model, weights)
    total = sum(model.files[name].size for name in weights)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        report("copying", WRITE_TO * done / max(1, total))

    files = [_publish(attempt, model, name, tensors, on_bytes) for name, tensors in weights.items()]
    beside = [*model.side_files, *([] if SINGLE_NAME in weights else [INDEX_NAME])]
    cleaned = without_quantization(model.config)
    if cleaned == model.config:
        beside.append(CONFIG_NAME)
    else:
        content = config_bytes(cleaned)
        files.append(attempt.publish(CONFIG_NAME, lambda writer: writer.write(content), size=len(content)))
    files += [_publish(attempt, model, name, (), lambda _: None) for name in beside]
    if base is not None:
        files += [publish_copy(attempt, name, base.directory / name) for name in files_from_base(model, base)]
    report("verifying", WRITE_TO)
    _verify(attempt, files)
    count = sum(map(len, weights.values()))
    checked = sum(tensor.dtype in TORCH_DTYPE for tensors in weights.values() for tensor in tensors)
    verified = {"files_crc32c": len(files), "tensors_finite": checked}
    return Made(files, {"copied": count, "bytes": total}, verified, cleaned)


def _publish(
    attempt: Attempt, model: FullModel, name: str, tensors: Sequence[Tensor], on_bytes: Callable[[int], None]
) -> StoredFile:
    """Publish a copy of a file whose bytes are those that were listed; tensors in it are looked at as they pass by."""
    listed = model.files[name]

    def fill(writer: ArtifactWriter) -> None:
        crc = Crc32c()
        with model.open(name) as reader:
            for start, end in _blocks(tensors, reader.size):
                block = reader.read(start, end - start)
                if len(block) < end - start:
                    raise changed(name)
                _refuse_not_finite(block, start, tensors)
                crc.update(block)
                writer.write(block)
                on_bytes(len(block))
        if crc.text != listed.crc32c:
            raise changed(name)

    return attempt.publish(name, fill, size=listed.size)


def _blocks(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `BLOCK_BYTES` that cover a file and split no element of a tensor."""
    starts = [tensor.start for tensor in tensors]
    start = 0
    while start < size:
        end = min(start + BLOCK_BYTES, size)
        within = bisect_right(starts, end) - 1
        if within >= 0 and end < size:
            tensor = tensors[within]
            end -= (end - tensor.start) % ITEM_SIZE[tensor.dtype]
        yield start, end
        start = end


def _refuse_not_finite(block: bytes, start: int, tensors: Sequence[Tensor]) -> None:
    first = max(0, bisect_right([tensor.start for tensor in tensors], start) - 1)
    for tensor in tensors[first:]:
        begin, end = max(tensor.start, start), min(tensor.start + tensor.nbytes, start + len(block))
        if tensor.start >= start + len(block):
            return
        if begin < end and tensor.dtype in TORCH_DTYPE:
            values = torch.frombuffer(bytearray(block[begin - start : end - start]), dtype=TORCH_DTYPE[tensor.dtype])
            if not is_sound(values, unbounded=UNBOUNDED.search(tensor.name) is not None):
                raise SourceError(
                    f"the model's tensor {tensor.name!r} holds NaN or infinity: the training diverged.",
                    code="model_not_finite",
                )


def _verify(attempt: Attempt, files: Sequence[StoredFile]) -> None:
    """Compare each written file, as the store has it, with what was read: by its own checksum, else by reading it."""
    there = {file.name: file for file in attempt.store.list(attempt.store.uri(attempt.directory), checksums=False)}
    for file in files:
        if file.name not in there:
            raise vanished(f"{attempt.directory}/{file.name}")
        found = there[file.name].crc32c or _checksum(attempt, file.name)
        if (there[file.name].size, found) != (file.size, file.crc32c):
            raise VerificationFailed(
                f"{file.name} has crc32c {found} where it was written, {file.crc32c} was read.", code="copy_differs"
            )


def _checksum(attempt: Attempt, name: str) -> str:
    crc = Crc32c()
    try:
        with attempt.store.open(attempt.store.uri(f"{attempt.directory}/{name}")) as reader:
            for block in range(math.ceil(reader.size / BLOCK_BYTES)):
                crc.update(reader.read(block * BLOCK_BYTES, BLOCK_BYTES))
    except NotFound as error:
        raise vanished(f"{attempt.directory}/{name}") from error
    return crc.text
