"""The algebra of LoRA alone: pure functions on tensors, no disk.

`W' = round(W + s * (B @ A))`, computed in float32 in exactly this order and rounded once to W's dtype, which is also
what PEFT computes for float32 adapter weights.
Source: LoRA, https://arxiv.org/abs/2106.09685; rsLoRA's scale, https://arxiv.org/abs/2312.03732.
"""

import itertools
import math

import torch

from dispatcher.errors import VerificationFailed

MIN_ROWS = 16
"""Fewer rows than this are never folded alone, unless the weight has no more."""


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """The factor s: `alpha / rank`, or `alpha / sqrt(rank)` with rank-stabilised LoRA."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def fold(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The merged weight, as one dense expression; `fold_rows_` is the same in bounded memory.

    Args:
        weight: [out, in], any floating dtype.
        a: [rank, in].
        b: [out, rank].
        scale: The factor s.

    Returns:
        [out, in] in the dtype of `weight`.
    """
    return (weight.float() + (b.float() @ a.float()) * scale).to(weight.dtype)


def row_blocks(rows: int, width: int, limit: int) -> list[tuple[int, int]]:
    """Split a [rows, width] weight into (first, count) blocks of about `limit` elements, for `fold_rows_`.

    A matrix product of a few rows, or of width 1, goes to another kernel that sums in another order; then a block
    would differ in the last bit from the whole. So blocks are even and never small.
    """
    if rows == 0 or width == 0:
        return []
    per_block = max(limit // width, 2 * MIN_ROWS)
    blocks = max(1, rows // per_block) if width > 1 else 1
    edges = [rows * index // blocks for index in range(blocks + 1)]
    return [(first, end - first) for first, end in itertools.pairwise(edges)]


def fold_rows_(rows: torch.Tensor, a: torch.Tensor, b_rows: torch.Tensor, scale: float, scratch: torch.Tensor) -> None:
    """Merge some rows of a weight in place, allocating nothing.

    Args:
        rows: [n, in] of the weight, bfloat16, float16 or float32; overwritten with the merged rows.
        a: [rank, in], float32.
        b_rows: [n, rank], float32: the same rows of B.
        scale: The factor s.
        scratch: float32, at least n * in elements; overwritten.

    Raises:
        VerificationFailed: `merge_overflow` when a merged value is not finite in the weight's dtype.
    """
    delta = scratch[: rows.numel()].view(rows.shape)
    torch.mm(b_rows, a, out=delta)
    delta.mul_(scale).add_(rows)
    rows.copy_(delta)
    if not _is_finite(rows):
        raise VerificationFailed(
            f"merged values are not finite in {str(rows.dtype).removeprefix('torch.')}: the base holds NaN or "
            "infinity, or the adapter's weights or its scale are far too large for it",
            code="merge_overflow",
        )


def _is_finite(values: torch.Tensor) -> bool:
    # One pass without a mask: a NaN or an infinity always makes the sum non-finite. The reverse does not hold,
    # so only a suspicious sum pays for the exact test.
    total = values.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(torch.isfinite(values).all().item())
