"""Re-reads what was written and says what holds; a check that fails fails the export before a manifest exists."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dispatcher.artifacts import ArtifactReader, ArtifactStore
from dispatcher.errors import NotFound, Unavailable, VerificationFailed
from exporter.adapter import Adapter, Change, LoraPair
from exporter.checkpoint import Checkpoint, Tensor, TensorFile, open_checkpoint
from exporter.gemma import Family, canonical_name
from exporter.plan import OutputFile, Plan
from exporter.saved import Saved
from exporter.tensors import TORCH_DTYPE, read_elements, read_tensor

SAMPLED_TENSORS = 12
SAMPLED_ROWS = 2
SAMPLED_BYTES = 65536
FLOAT32_EPS = 2.0**-24

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Place:
    """A tensor of the output."""

    file: OutputFile
    tensor: Tensor
    start: int
    """The offset of its bytes in the file."""

    @property
    def change(self) -> Change | None:
        """What the plan does to it; None is a copy."""
        return self.file.changes.get(self.tensor.name)


def verify_merged(store: ArtifactStore, directory: str, plan: Plan, adapter: Adapter) -> dict[str, Any]:
    """Check the written shards of a plan against the plan, the base and the adapter.

    Every file: its header and size. A sample of merged tensors: rows recomputed in float64 from base and adapter.
    A sample of replaced ones: rows as the adapter has them. A sample of copied ones: their first bytes.

    Returns:
        What was checked, for the manifest: counts, and the worst error in ulps of the output's dtype.

    Raises:
        VerificationFailed: `nothing_changed`, `header_differs`, `merge_wrong` or `copy_differs`.
        Unavailable: A file is not there any more (`artifact_vanished`).
    """
    if plan.merged + plan.replaced == 0:
        raise VerificationFailed("the plan changes no tensor at all.", code="nothing_changed")
    written = [place for planned in plan.files for place in _written(planned) if place.tensor.nbytes]
    merged = _spread([(place, pair) for place in written if isinstance(pair := place.change, LoraPair)])
    replaced = _spread([(place, saved) for place in written if isinstance(saved := place.change, Saved)])
    copied = _spread([place for place in written if place.change is None])
    worst = 0.0
    for planned in plan.files:
        with _opened(store, directory, planned) as output:
            for place, pair in merged:
                if place.file is planned:
                    worst = max(worst, _merge_error(output, place, pair, adapter))
            for place, saved in replaced:
                if place.file is planned:
                    _refuse_replacement_that_differs(output, place, saved, adapter)
            for place in copied:
                if place.file is planned:
                    _refuse_copy_that_differs(output, place)
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


def _written(planned: OutputFile) -> list[_Place]:
    """Each tensor of an output file with the offset it was written at."""
    start, found = len(planned.header), []
    for tensor in planned.source.tensors:
        found.append(_Place(planned, tensor, start))
        start += tensor.nbytes
    return found


def _spread(items: Sequence[Item]) -> Sequence[Item]:
    """A few items, evenly spread over all of them, the first and the last included."""
    if len(items) <= SAMPLED_TENSORS:
        return items
    return [items[round(i * (len(items) - 1) / (SAMPLED_TENSORS - 1))] for i in range(SAMPLED_TENSORS)]


def _source_bytes(file: TensorFile, offset: int, length: int) -> bytes:
    with file.open() as source:
        return os.pread(source.fileno(), length, offset)


def _refuse_copy_that_differs(output: ArtifactReader, place: _Place) -> None:
    length = min(place.tensor.nbytes, SAMPLED_BYTES)
    if output.read(place.start, length) != _source_bytes(place.file.source, place.tensor.start, length):
        raise VerificationFailed(f"{place.tensor.name} differs from the base's.", code="copy_differs")


def _refuse_replacement_that_differs(output: ArtifactReader, place: _Place, saved: Saved, adapter: Adapter) -> None:
    """Compare what was replaced with the adapter's own values, rounded to the base's dtype, as far as is sampled."""
    dtype = TORCH_DTYPE[place.tensor.dtype]
    width = math.prod(place.tensor.shape[1:])
    rows = range(place.tensor.shape[0]) if saved.rows is None else saved.rows
    sampled = _spread(list(enumerate(rows)))
    for index, row in sampled:
        wanted = read_elements(adapter.file, saved.tensor, index * width, width).to(dtype)
        found = output.read(place.start + row * width * dtype.itemsize, width * dtype.itemsize)
        if not torch.equal(torch.frombuffer(bytearray(found), dtype=dtype), wanted):
            raise VerificationFailed(f"row {row} of {place.tensor.name} is not the adapter's.", code="merge_wrong")


def _merge_error(output: ArtifactReader, place: _Place, pair: LoraPair, adapter: Adapter) -> float:
    """The worst error, in ulps, of some rows of a merged tensor against float64.

    The bound is half an ulp for the one rounding, plus the float32 error of a dot product of length rank and, with
    DoRA, of the row's norm (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5).
    """
    tensor = place.tensor
    dtype = TORCH_DTYPE[tensor.dtype]
    rows, width = tensor.shape
    row_bytes = width * dtype.itemsize
    a = read_tensor(adapter.file, pair.a).double()
    b = read_tensor(adapter.file, pair.b)
    magnitude = None if pair.magnitude is None else read_tensor(adapter.file, pair.magnitude)
    worst = 0.0
    for row in sorted({rows * i // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}):
        source = _source_bytes(place.file.source, tensor.start + row * row_bytes, row_bytes)
        merged = output.read(place.start + row * row_bytes, row_bytes)
        weight = torch.frombuffer(bytearray(source), dtype=dtype).double()
        found = torch.frombuffer(bytearray(merged), dtype=dtype)
        exact = weight + pair.scale * (b[row].double() @ a)
        slack = (pair.rank + 3) * FLOAT32_EPS * (weight.abs() + abs(pair.scale) * (b[row].double().abs() @ a.abs()))
        if magnitude is not None:
            norm = torch.linalg.vector_norm(exact)
            factor = magnitude[row].double() / norm
            exact = exact * factor
            of_norm = (width + 8) * FLOAT32_EPS + torch.linalg.vector_norm(slack) / norm
            slack = slack * factor.abs() + exact.abs() * of_norm
        ulp = _ulp(exact, dtype)
        error = (found.double() - exact).abs()
        if not bool((error <= 0.5 * ulp + slack).all()):
            raise VerificationFailed(
                f"row {row} of {tensor.name} is off by {float((error / ulp).max()):.3g} ulp.",
                code="merge_wrong",
            )
        worst = max(worst, float((error / ulp).max()))
    return worst


def _ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of `dtype` at each value; float64."""
    facts = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp(min=facts.tiny)))
    return torch.exp2(exponent) * 2.0 ** round(math.log2(facts.eps))
