"""The algebra: streamed equals dense in every bit, and both are the correctly rounded sum."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.errors import VerificationFailed
from exporter.lora import MIN_ROWS, factors, fold, fold_rows_, row_blocks, scaling

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@st.composite
def folds(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int]:
    """A weight, its factors, a scale, and how many elements to fold at a time."""
    rows, width, rank = (
        draw(st.integers(1, 200)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([1, 2, 3, 8, 16, 17, 64, 129, 256])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, width, generator=generator).to(draw(st.sampled_from(DTYPES)))
    a, b = torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator)
    scale = draw(st.one_of(st.floats(-8, 8, allow_nan=False, width=32), st.sampled_from([0.5, 1.0, 2.0, -4.0])))
    return weight, a, b, scale, draw(st.integers(1, 20000))


@settings(deadline=None, max_examples=200)
@given(folds())
def test_folding_rows_in_place_equals_the_dense_expression(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int],
) -> None:
    weight, a, b, scale, limit = case
    streamed = weight.clone()
    scratch = torch.full((2 * weight.numel(),), math.nan)
    for first, count in row_blocks(weight.shape[0], weight.shape[1], limit):
        rows = slice(first, first + count)
        fold_rows_(streamed[rows], first, factors(a, b, scale), scratch)
    assert torch.equal(streamed, fold(weight, a, b, scale))


@settings(deadline=None, max_examples=100)
@given(folds(), st.integers(0, 2**32))
def test_with_magnitudes_every_row_gets_its_length(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int], seed: int
) -> None:
    """DoRA, block by block: within half a step of the float64 result, plus the float32 error of sum and norm."""
    weight, a, b, scale, limit = case
    magnitude = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(seed))
    streamed = weight.clone()
    scratch = torch.full((2 * weight.numel(),), math.nan)
    for first, count in row_blocks(weight.shape[0], weight.shape[1], limit):
        rows = slice(first, first + count)
        fold_rows_(streamed[rows], first, factors(a, b, scale, rows=magnitude), scratch)
    total = weight.double() + scale * (b.double() @ a.double())
    norms = torch.linalg.vector_norm(total, dim=1)[:, None]
    exact = total * magnitude.double()[:, None] / norms
    size = weight.double().abs() + abs(scale) * (b.double().abs() @ a.double().abs())
    slack = (a.shape[0] + weight.shape[1] + 8) * 2.0**-24 * (size / norms * magnitude[:, None].abs() + exact.abs())
    slack += exact.abs() * (a.shape[0] + 3) * 2.0**-24 * torch.linalg.vector_norm(size, dim=1)[:, None] / norms
    bound = exact.abs() * torch.finfo(weight.dtype).eps / 2 + slack + 1e-7
    for merged in (streamed, fold(weight, a, b, scale, magnitude)):
        assert ((merged.double() - exact).abs() <= bound).all()


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 10**6))
def test_row_blocks_cover_every_row_once_and_are_never_small(rows: int, width: int, limit: int) -> None:
    blocks = row_blocks(rows, width, limit)
    covered = [row for first, count in blocks for row in range(first, first + count)]
    assert covered == (list(range(rows)) if width else [])
    assert all(count >= min(rows, MIN_ROWS) for _, count in blocks)


@settings(deadline=None, max_examples=200)
@given(folds())
def test_the_result_is_the_exact_sum_rounded_once(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int],
) -> None:
    """Within half a step of the output's dtype of the float64 result, plus the float32 error of the sum."""
    weight, a, b, scale, _ = case
    exact = weight.double() + scale * (b.double() @ a.double())
    size = weight.double().abs() + abs(scale) * (b.double().abs() @ a.double().abs())
    bound = exact.abs() * torch.finfo(weight.dtype).eps / 2 + (a.shape[0] + 3) * 2.0**-24 * size + 1e-7
    assert ((fold(weight, a, b, scale).double() - exact).abs() <= bound).all()


@settings(deadline=None)
@given(folds())
def test_a_zero_adapter_changes_nothing(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int],
) -> None:
    weight, a, b, scale, _ = case
    assert torch.equal(fold(weight, a, torch.zeros_like(b), scale), weight)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 2.0), (True, 8.0)])
def test_the_scale_is_alpha_over_rank_or_its_root(rslora: bool, expected: float) -> None:
    assert scaling(32, 16, use_rslora=rslora) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_outside_the_dtype_is_refused(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 3, dtype=dtype)
    huge = torch.full((1, 3), torch.finfo(dtype).max, dtype=torch.float32)
    with pytest.raises(VerificationFailed) as refused:
        fold_rows_(weight, 0, factors(huge, torch.full((2, 1), 2.0), 2.0), torch.empty(12))
    assert refused.value.error_code == "merge_overflow"
