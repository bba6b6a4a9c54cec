"""Everything that PEFT can train with LoRA, for every family: merged right, or refused by name."""

from pathlib import Path

import pytest

from tests.exporter.matrix import RIGHT, ROWS, Row, cell

REPRESENTATIVES = ("gemma3_text", "gemma3", "gemma4_moe")
CELLS = [
    pytest.param(
        row,
        family,
        id=f"{row.name}-{family}",
        marks=[] if family == next((f for f in REPRESENTATIVES if f in row.families), None) else [pytest.mark.full],
    )
    for row in ROWS
    for family in row.families
]


@pytest.mark.filterwarnings("ignore")  # of PEFT's, about what makes some rows unusual
@pytest.mark.parametrize(("row", "family"), CELLS)
def test_every_feature_is_right_or_refused_by_name(row: Row, family: str, tmp_path: Path) -> None:
    """Right is what the unmerged model says, and as often the correctly rounded value as PEFT's where that is right."""
    found = cell(row, family, tmp_path)
    assert found.outcome == row.outcome
    if row.outcome == RIGHT and row.judge is None:
        assert found.of > 0
        assert found.rounded_here >= found.rounded_in_peft
        # One in a thousand float32 sums, or one of a few, may lie on the edge between two values.
        assert found.of - found.rounded_here <= max(1, 0.001 * found.of)
