"""Re-reads a GGUF file that was written: all of it by checksum, a sample of its weights against base and adapter."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dispatcher.artifacts import ArtifactReader, ArtifactStore, StoredFile
from dispatcher.errors import NotFound, VerificationFailed
from exporter.exact import exact_rows
from exporter.gguf_file import GgufFile, GgufTensor
from exporter.merged_tensors import MergedTensors
from exporter.pairs import AddedBias, LoraPair
from exporter.saved import Saved
from exporter.tensors import read_elements
from exporter.verify import checksum_of, spread, vanished

LIMITS = {
    "F32": 2.0**-8,
    "F16": 2.0**-8,
    "BF16": 2.0**-8,
    "Q8_0": 0.02,
    "Q6_K": 0.06,
    "Q5_K": 0.12,
    "Q5_0": 0.15,
    "Q5_1": 0.15,
    "Q4_K": 0.25,
    "Q4_0": 0.3,
    "IQ4_NL": 0.3,
    "IQ4_XS": 0.3,
    "Q3_K": 0.45,
    "Q2_K": 0.7,
}
"""How far a row of each tensor type may be from the exact one, as a part of it: root mean squares. About three times
what normally distributed weights give; any other row is more than 1 away."""


def verify_gguf(
    store: ArtifactStore, directory: str, file: GgufFile, stored: StoredFile, merged: MergedTensors
) -> dict[str, Any]:
    """Check a written file against its plan, the base and the adapter.

    Args:
        store: Where it is.
        directory: The version's, in the store.
        file: What was to be written.
        stored: What the writing said of it, checksum included.
        merged: What it was written from.

    Returns:
        What was checked, for the manifest: counts, and the worst error of a row as a part of it, per tensor type.

    Raises:
        VerificationFailed: `header_differs`, `checksum_differs` or `merge_wrong`.
        Unavailable: It is not there any more (`artifact_vanished`).
    """
    try:
        reader = store.open(store.uri(f"{directory}/{file.name}"))
    except NotFound as error:
        raise vanished(f"{directory}/{file.name}") from error
    with reader:
        if reader.size != file.size or reader.read(0, len(file.head)) != file.head:
            raise VerificationFailed(f"{file.name} is not of the planned size and header.", code="header_differs")
        told = {found.name: found.crc32c for found in store.list(store.uri(directory), checksums=False)}
        if (told.get(file.name) or checksum_of(reader)) != stored.crc32c:
            raise VerificationFailed(f"{file.name} is not what was written.", code="checksum_differs")
        plain = [tensor for tensor in file.tensors if hasattr(tensor.info.tensor, "rows") and tensor.nbytes]
        own = [tensor for tensor in plain if tensor.info.tensor.rows.kept]
        changed = [tensor for tensor in own if merged.outputs[_source(tensor)].change is not None]
        copied = [tensor for tensor in own if merged.outputs[_source(tensor)].change is None]
        worst: dict[str, float] = {}
        sampled: Sequence[GgufTensor] = (*spread(changed), *spread(copied))
        for tensor in sampled:
            kind = _kind(tensor).name
            worst[kind] = max(worst.get(kind, 0.0), _error(reader, tensor, merged))
    return {
        "tensors": len(file.tensors),
        "merged_sampled": len(spread(changed)),
        "copied_sampled": len(spread(copied)),
        "worst_error": {kind: float(f"{error:.2g}") for kind, error in sorted(worst.items())},
    }


def _source(tensor: GgufTensor) -> str:
    return str(tensor.info.tensor.rows.source)


def _kind(tensor: GgufTensor) -> Any:
    import gguf

    return gguf.GGMLQuantizationType(tensor.kind)


def _error(reader: ArtifactReader, tensor: GgufTensor, merged: MergedTensors) -> float:
    """The worst error of the sampled rows of a tensor, each as a part of the row.

    Raises:
        VerificationFailed: `merge_wrong`.
    """
    import gguf

    kind, worst = _kind(tensor), 0.0
    limit = LIMITS[kind.name]
    width = tensor.width
    row_bytes = tensor.nbytes * width // math.prod(tensor.info.shape)
    for first, exact in _expected(tensor, merged):
        start = tensor.start + first // width * row_bytes
        data = np.frombuffer(bytearray(reader.read(start, exact.numel() // width * row_bytes)), dtype=np.uint8)
        found = torch.from_numpy(gguf.quants.dequantize(data, kind)).flatten().double()
        size = float(exact.square().mean().sqrt())
        error = float((found - exact).square().mean().sqrt()) / (size or 1.0)
        if not error <= limit:
            raise VerificationFailed(
                f"{tensor.name} ({kind.name}) is {error:.3g} of its own size away from base and adapter, from weight "
                f"{first} on; the limit is {limit}.",
                code="merge_wrong",
            )
        worst = max(worst, error)
    return worst


def _expected(tensor: GgufTensor, merged: MergedTensors) -> Iterator[tuple[int, torch.Tensor]]:
    """Whole rows of what a tensor should be: the flat index each begins with, and float64 values."""
    name = _source(tensor)
    output, file = merged.outputs[name], merged.file_of(name)
    limit = tensor.info.tensor.rows.kept * math.prod(tensor.info.shape[1:])
    width = tensor.width
    if isinstance(output.change, LoraPair | AddedBias) and merged.adapter is not None:
        with file.source.open() as source:
            for first, exact, _ in exact_rows(file, output, merged.adapter, source):
                if first + exact.numel() <= limit:
                    yield first, exact
    elif isinstance(output.change, Saved) and merged.adapter is not None:
        rows = range(tensor.info.shape[0]) if output.change.rows is None else output.change.rows
        stride = math.prod(tensor.info.shape[1:])
        for index, row in spread(list(enumerate(rows))):
            if (row + 1) * stride <= limit:
                yield (
                    row * stride,
                    read_elements(merged.adapter.file, output.change.tensor, index * stride, stride).double(),
                )
    else:
        for first in sorted({0, (limit // width // 2) * width, limit - width}):
            yield first, read_elements(file.source, output.source, first, width).double()
