"""Re-reads what was written and says what holds; a check that fails fails the export before a manifest exists."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dispatcher.artifacts import ArtifactReader, ArtifactStore, StoredFile
from dispatcher.crc32c import Crc32c
from dispatcher.errors import NotFound, Unavailable, VerificationFailed
from exporter.adapter import Adapter
from exporter.byte_source import ByteReader, read_bytes
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.exact import exact_rows
from exporter.gemma import Family, canonical_name
from exporter.plan import OutputFile, OutputTensor, Plan
from exporter.saved import Saved
from exporter.tensors import TORCH_DTYPE, read_elements, read_tensor

SAMPLED_TENSORS = 12
SAMPLED_BYTES = 65536
READ_BYTES = 4 << 20

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Place:
    """A tensor of the output."""

    file: OutputFile
    output: OutputTensor
    start: int
    """The offset of its bytes in the file."""

    @property
    def name(self) -> str:
        return self.output.tensor.name

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.output.tensor.dtype]

    def written(self, reader: ArtifactReader, first: int, count: int) -> torch.Tensor:
        """`count` of its elements from the flat index `first` on."""
        size = self.dtype.itemsize
        return torch.frombuffer(
            bytearray(reader.read(self.start + first * size, count * size)), dtype=self.dtype, count=count
        )


def verify_merged(
    store: ArtifactStore, directory: str, plan: Plan, adapter: Adapter, files: Sequence[StoredFile]
) -> dict[str, Any]:
    """Check the written shards of a plan against the plan, the base and the adapter.

    Every file: its header, size, and checksum, read back unless the store itself tells it. A sample of merged tensors:
    rows recomputed in float64 from base and adapter. A sample of replaced ones: rows as the adapter has them. A sample
    of copied ones: their first bytes.

    Args:
        store: Where they are.
        directory: The version's, in the store.
        plan: What was to be written.
        adapter: What was merged.
        files: What the writing said of the files, checksums included.

    Returns:
        What was checked, for the manifest: counts, and the worst error in ulps of the output's dtype.

    Raises:
        VerificationFailed: `nothing_changed`, `header_differs`, `checksum_differs`, `merge_wrong` or `copy_differs`.
        Unavailable: A file is not there any more (`artifact_vanished`).
    """
    written = [place for planned in plan.files for place in _written(planned) if place.output.tensor.nbytes]
    changed = [place for place in written if place.output.change is not None]
    if not changed:
        raise VerificationFailed("the plan changes no tensor at all.", code="nothing_changed")
    merged = spread([place for place in changed if not isinstance(place.output.change, Saved)])
    replaced = spread([place for place in changed if isinstance(place.output.change, Saved)])
    copied = spread([place for place in written if place.output.change is None])
    checksums = {file.name: file.crc32c for file in files}
    told = {file.name: file.crc32c for file in store.list(store.uri(directory), checksums=False)}
    worst = 0.0
    for planned in plan.files:
        with _opened(store, directory, planned) as reader, planned.source.open() as source:
            if (told.get(planned.name) or checksum_of(reader)) != checksums[planned.name]:
                raise VerificationFailed(f"{planned.name} is not what was written.", code="checksum_differs")
            for place in merged:
                if place.file is planned:
                    worst = max(worst, _merge_error(reader, place, adapter, source))
            for place in replaced:
                if place.file is planned:
                    _refuse_replacement_that_differs(reader, place, adapter)
            for place in copied:
                if place.file is planned:
                    _refuse_copy_that_differs(reader, place)
    return {
        "files": len(plan.files),
        "merged_sampled": len(merged),
        "replaced_sampled": len(replaced),
        "copied_sampled": len(copied),
        "worst_error_ulp": round(worst, 4),
    }


def verify_reference(written: Path, base: Checkpoint, family: Family) -> dict[str, Any]:
    """Check what a reference engine wrote, as far as it can be checked without its own plan.

    Every floating tensor is finite, one by one, and at least one differs from the base's of the same name once that
    is rounded to the output's dtype.

    Raises:
        VerificationFailed: `output_not_finite` or `nothing_changed`.
    """
    originals = {canonical_name(name, family): place for name, place in base.tensors().items()}
    checked, changed = 0, 0
    for name, (file, tensor) in open_checkpoint(written).tensors().items():
        if tensor.dtype not in TORCH_DTYPE:
            continue
        checked += 1
        values = read_tensor(file, tensor)
        original = originals.get(canonical_name(name, family))
        known = original is not None and original[1].dtype in TORCH_DTYPE
        before = read_tensor(*original).to(values.dtype) if original is not None and known else None
        same = before is not None and torch.equal(values, before)
        changed += before is not None and not same
        if not same and not torch.isfinite(values).all():
            raise VerificationFailed(f"{name} holds NaN or infinity.", code="output_not_finite")
    if changed == 0:
        raise VerificationFailed("no tensor differs from the base's.", code="nothing_changed")
    return {"tensors_read": checked, "tensors_changed": changed}


@contextmanager
def _opened(store: ArtifactStore, directory: str, planned: OutputFile) -> Iterator[ArtifactReader]:
    """A written file, open, whose size and header are as planned."""
    try:
        reader = store.open(store.uri(f"{directory}/{planned.name}"))
    except NotFound as error:
        raise vanished(f"{directory}/{planned.name}") from error
    with reader as output:
        if output.size != planned.size or output.read(0, len(planned.header)) != planned.header:
            raise VerificationFailed(f"{planned.name} is not of the planned size and header.", code="header_differs")
        yield output


def vanished(what: str) -> Unavailable:
    """Somebody else removed what we had written: nothing is wrong with the merge, so it is made again."""
    return Unavailable(f"{what} vanished before it was published: try again", code="artifact_vanished")


def checksum_of(reader: ArtifactReader) -> str:
    crc = Crc32c()
    for offset in range(0, reader.size, READ_BYTES):
        crc.update(reader.read(offset, READ_BYTES))
    return crc.text


def _written(planned: OutputFile) -> list[_Place]:
    """Each tensor of an output file with the offset it was written at."""
    start, found = len(planned.header), []
    for output in planned.tensors:
        found.append(_Place(planned, output, start))
        start += output.tensor.nbytes
    return found


def spread(items: Sequence[Item]) -> Sequence[Item]:
    """A few items, evenly spread over all of them, the first and the last included."""
    if len(items) <= SAMPLED_TENSORS:
        return items
    return [items[round(i * (len(items) - 1) / (SAMPLED_TENSORS - 1))] for i in range(SAMPLED_TENSORS)]


def _refuse_copy_that_differs(reader: ArtifactReader, place: _Place) -> None:
    length = min(place.output.tensor.nbytes, SAMPLED_BYTES)
    with place.file.source.open() as source:
        original = read_bytes(source, place.output.source.start, length)
    if reader.read(place.start, length) != original:
        raise VerificationFailed(f"{place.name} differs from the base's.", code="copy_differs")


def _refuse_replacement_that_differs(reader: ArtifactReader, place: _Place, adapter: Adapter) -> None:
    """Compare what was replaced with the adapter's own values, rounded to the base's dtype, as far as is sampled."""
    saved = place.output.change
    assert isinstance(saved, Saved)  # noqa: S101  # the type checker's sake
    shape = place.output.tensor.shape
    width = math.prod(shape[1:])
    rows = range(shape[0] if shape else 1) if saved.rows is None else saved.rows
    for index, row in spread(list(enumerate(rows))):
        wanted = read_elements(adapter.file, saved.tensor, index * width, width).to(place.dtype)
        if not torch.equal(place.written(reader, row * width, width), wanted):
            raise VerificationFailed(f"row {row} of {place.name} is not the adapter's.", code="merge_wrong")


def _merge_error(reader: ArtifactReader, place: _Place, adapter: Adapter, source: ByteReader) -> float:
    """The worst error of what is sampled of a merged tensor, in ulps, against float64.

    Raises:
        VerificationFailed: `merge_wrong`.
    """
    worst = 0.0
    for first, exact, slack in exact_rows(place.file, place.output, adapter, source):
        ulp = _ulp(exact, place.dtype)
        error = (place.written(reader, first, exact.numel()).double() - exact).abs()
        if not bool((error <= 0.5 * ulp + slack).all()):
            raise VerificationFailed(
                f"{place.name} is off by {float((error / ulp).max()):.3g} ulp from element {first} on.",
                code="merge_wrong",
            )
        worst = max(worst, float((error / ulp).max()))
    return worst


def _ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of `dtype` at each value; float64."""
    facts = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp(min=facts.tiny)))
    return torch.exp2(exponent) * 2.0 ** round(math.log2(facts.eps))
