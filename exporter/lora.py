"""The algebra of LoRA alone: pure functions on tensors, no disk.

`W' = round(V)` with `V = W + s * (B @ A)`, computed in float32 and rounded once to W's dtype, which is also what PEFT
computes for float32 adapter weights. With DoRA's magnitudes m, `W' = round(m / ‖V‖ * V)`, the norm taken of each row.
Source: LoRA, https://arxiv.org/abs/2106.09685; rsLoRA's scale, https://arxiv.org/abs/2312.03732; DoRA,
https://arxiv.org/abs/2402.09353, section 4.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch

from dispatcher.errors import VerificationFailed

MIN_ROWS = 16
MIN_WIDTH = 64
"""Within these bounds a BLAS sums each element of B @ A in the same order whether it makes the whole product or some
rows of it. Outside it may take another kernel, and PEFT's result would differ in the last bit; so narrower weights are
folded whole."""


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """The factor s: `alpha / rank`, or `alpha / sqrt(rank)` with rank-stabilised LoRA."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def fold(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """The merged weight, as one dense expression; `fold_rows_` is the same in bounded memory.

    Args:
        weight: [out, in], any floating dtype.
        a: [rank, in].
        b: [out, rank].
        scale: The factor s.
        magnitude: [out], DoRA's m; None for plain LoRA.

    Returns:
        [out, in] in the dtype of `weight`.
    """
    total = weight.float() + (b.float() @ a.float()) * scale
    if magnitude is not None:
        total = total * (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)


@dataclass(frozen=True)
class Factors:
    """A trained pair, ready to be folded into rows of a weight."""

    a: torch.Tensor
    """[rank, in], float32"""
    b: torch.Tensor
    """[out, rank], float32, times s already where `scale` is 1"""
    scale: float
    """What is left of s to multiply with"""
    largest: float
    """No element of s * (B @ A) is larger in magnitude than this."""
    rows: torch.Tensor | None
    """[out], float32: the length that DoRA gives each row"""
    columns: torch.Tensor | None
    """[in], float32: the length that DoRA gives each column, which is how PEFT has it for embeddings"""


def factors(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    *,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> Factors:
    """Prepare A [rank, in], B [out, rank] and DoRA's m ([out] or [in]), of any floating dtype, for `fold_rows_`."""
    a, b = a.float(), b.float()
    top_a, top_b = (float(half.abs().max()) if half.numel() else 0.0 for half in (a, b))
    largest = abs(scale) * a.shape[0] * top_a * top_b
    rows, columns = (None if lengths is None else lengths.float() for lengths in (rows, columns))
    # Times a power of two is exact as long as no element becomes subnormal, so it may come first.
    if abs(math.frexp(scale)[0]) == 0.5 and 2.0**-40 < abs(scale) < 2.0**40 and not _near_subnormal(b):
        return Factors(a, b * scale, 1.0, largest, rows, columns)
    return Factors(a, b, scale, largest, rows, columns)


def _near_subnormal(values: torch.Tensor) -> bool:
    return bool(((values != 0) & (values.abs() < 2.0**-80)).any())


@dataclass(frozen=True)
class Delta:
    """How far some values went from what they were, before the rounding to their dtype."""

    largest: float
    """max |Δ|"""
    squared: float
    """‖Δ‖²"""
    before_squared: float
    """‖W‖²"""
    written: bool = False
    """Whether any value is another one once it is rounded"""

    def __add__(self, other: "Delta") -> "Delta":
        return Delta(
            max(self.largest, other.largest),
            self.squared + other.squared,
            self.before_squared + other.before_squared,
            self.written or other.written,
        )


def put_(values: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Delta:
    """Round `after` into `values`, which hold `before` so far; float32 both, of the same shape.

    Infinity is only what was infinite in `after` already: a caller that computed that looks at it.

    Raises:
        VerificationFailed: `merge_overflow`.
    """
    moved = _measured(after - before, before)  # first: `before` may be these very values
    moved = replace(moved, written=_round_into(values, after))
    if not torch.equal(torch.isfinite(values), torch.isfinite(after)):
        refuse_overflow(values)
    return moved


def _round_into(values: torch.Tensor, after: torch.Tensor) -> bool:
    """Write what is rounded; whether that changed anything."""
    rounded = after.to(values.dtype)
    changed = not torch.equal(values, rounded)
    values.copy_(rounded)
    return changed


def _measured(delta: torch.Tensor, before: torch.Tensor) -> Delta:
    if not delta.numel():
        return Delta(0.0, 0.0, 0.0)
    low, high = torch.aminmax(delta)
    squared, before_squared = (float(torch.linalg.vector_norm(values)) ** 2 for values in (delta, before))
    return Delta(max(-float(low), float(high)), squared, before_squared)


def row_blocks(rows: int, width: int, limit: int) -> list[tuple[int, int]]:
    """Split a [rows, width] weight into (first, count) blocks of about `limit` elements, for `fold_rows_`."""
    if rows == 0 or width == 0:
        return []
    per_block = max(limit // width, 2 * MIN_ROWS)
    blocks = max(1, rows // per_block) if width >= MIN_WIDTH else 1
    edges = [rows * index // blocks for index in range(blocks + 1)]
    return [(first, end - first) for first, end in itertools.pairwise(edges)]


def fold_rows_(
    rows: torch.Tensor, first: int, pair: Factors, scratch: torch.Tensor, *, base: torch.Tensor | None = None
) -> Delta:
    """Merge some rows of a weight in place, in memory that is used again.

    Args:
        rows: [n, in], the weight's rows from `first` on, bfloat16, float16 or float32; overwritten.
        first: Which row of the weight, and so of B, they begin with.
        pair: The factors; of `columns`, what each column is multiplied with instead of its length.
        scratch: float32, at least 2 * n * in elements; overwritten.
        base: [n, in], what is merged into if not what `rows` holds; any floating dtype.

    Raises:
        VerificationFailed: `merge_overflow` when a merged value is not finite in the weight's dtype.
    """
    # The product first, where memory is aligned: a BLAS may sum in another order where it is not.
    delta = scratch[: rows.numel()].view(rows.shape)
    before = scratch[rows.numel() : 2 * rows.numel()].view(rows.shape)
    before.copy_(rows if base is None else base)
    torch.mm(pair.b[first : first + rows.shape[0]], pair.a, out=delta)
    if pair.scale != 1.0:
        delta.mul_(pair.scale)
    if pair.rows is None and pair.columns is None:
        moved = _measured(delta, before)
        total = before.add_(delta)
    else:
        total = delta.add_(before)
        if pair.rows is not None:
            norms = torch.linalg.vector_norm(total, dim=1)
            total.mul_((pair.rows[first : first + rows.shape[0]] / norms)[:, None])
        if pair.columns is not None:
            total.mul_(pair.columns)
        moved = _measured(total - before, before)
    written = _round_into(rows, total)
    if _may_overflow(rows.dtype, pair):
        refuse_overflow(rows)
    return replace(moved, written=written)


def squares_by_column(rows: torch.Tensor, first: int, pair: Factors) -> torch.Tensor:
    """The sum of squares in each column of some rows of V: [in], float64.

    Args:
        rows: [n, in], the weight's rows from `first` on, any floating dtype.
        first: Which row of the weight, and so of B, they begin with.
        pair: The factors.
    """
    total = rows.float() + (pair.b[first : first + rows.shape[0]] @ pair.a) * pair.scale
    return total.double().square().sum(dim=0)


def refuse_overflow(values: torch.Tensor) -> None:
    """Refuse what is not finite once it has the base's dtype.

    Raises:
        VerificationFailed: `merge_overflow`.
    """
    if not torch.isfinite(values).all():
        raise VerificationFailed(
            f"merged values are not finite in {str(values.dtype).removeprefix('torch.')}: "
            "the adapter's weights, magnitudes or scale do not fit this base",
            code="merge_overflow",
        )


def _may_overflow(dtype: torch.dtype, pair: Factors) -> bool:
    # No base comes near the end of bfloat16's or float32's range; float16's is close enough to look at every value,
    # and a magnitude may be of any size, or be of a row that has none.
    scaled = pair.rows is not None or pair.columns is not None
    return dtype is torch.float16 or scaled or not pair.largest < torch.finfo(dtype).max / 4
