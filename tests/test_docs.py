"""What the documentation says was measured is what the rows of the benchmarks hold."""

from pathlib import Path

import half_the_tokens_rows
import halving_rows
import pytest
import quality_picture
import quality_rows
from rows import read

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "rows"
SMOLLM2, HALVING, HALF = ROWS / "smollm2-135m", ROWS / "halving", ROWS / "half"
SIZES = [size for model in (SMOLLM2, ROWS / "gemma3-270m") for size in quality_rows.sizes(model)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.parent.name}-{size.name}")
def test_tables_of_methods_are_made_of_their_rows(size):
    teacher = read(size.parent / "teacher.json")
    assert quality_rows.table(size, teacher) in (ROOT / "docs" / "quality.md").read_text()


def test_the_picture_is_made_of_the_same_rows():
    assert quality_picture.digest(SMOLLM2) in (ROOT / "docs" / "quality.svg").read_text()


def test_the_tournament_is_described_by_its_rows():
    page = (ROOT / "docs" / "quality.md").read_text()
    assert halving_rows.table(HALVING) in page
    assert halving_rows.summary(HALVING) in page


def test_the_table_of_half_the_tokens_is_made_of_its_rows():
    assert half_the_tokens_rows.table(HALF) in (ROOT / "docs" / "quality.md").read_text()
