"""What the long benchmarks say of the rows that they have so far."""

import half_the_tokens_rows
import halving_rows
import pytest
from rows import write

SHAPES = ["layers=3,hidden=8,ffn=4", "layers=2,hidden=8,ffn=8", "layers=1,hidden=8,ffn=9"]


@pytest.fixture
def halving(tmp_path):
    """The tournament is won by the second best; what was predicted is the order upside down."""
    for place, name in enumerate(SHAPES):
        write(tmp_path / f"{name}-0.json", {"tokens": 100, "loss": 3.0 + place})
    write(tmp_path / "candidates.json", {name: {"predicted": -float(place)} for place, name in enumerate(SHAPES)})
    long, short = {"tokens": [0, 50, 100], "losses": [5.0, 4.0, 3.0]}, {"tokens": [0, 50], "losses": [5.0, 4.5]}
    write(tmp_path / "tournament.json", {SHAPES[1]: long, SHAPES[0]: long, SHAPES[2]: short})
    return tmp_path


def test_halving_says_who_won_and_what_it_cost(halving):
    said = halving_rows.summary(halving)
    assert "chose layers 2, ffn 8 (4.0000), the best is layers 3, ffn 4 (3.0000)" in said
    assert "83%" in said  # 100 + 100 + 50 of 300
    assert "deviation" not in said  # one training tells nothing of it
    write(halving / f"{SHAPES[0]}-1.json", {"tokens": 100, "loss": 3.2})
    assert "Of 2 trainings of the best the standard deviation is 0.1414" in halving_rows.summary(halving)


def test_halving_ranks_candidates_by_their_full_training(halving):
    lines = halving_rows.table(halving).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| layers 3, ffn 4",
        "| layers 2, ffn 8",
        "| layers 1, ffn 9",
    ]
    assert lines[5] == "| Kendall's τ | -1.00 | 0.82 | 0.33 |  |"


def test_half_the_tokens_shows_pairs_alone(tmp_path):
    def row(tokens, perplexity, shape):
        judged = {"perplexity": perplexity, "kl_to_teacher": 0.5}
        return {"tokens": tokens, "teacher": judged, "distilled": judged, "architecture": shape}

    write(tmp_path / "0.5-Minitron-0.json", row(250_000, 84.0, SHAPES[0]))
    write(tmp_path / "0.5-Prunus-0.json", row(125_000, 74.8, SHAPES[1]))
    write(tmp_path / "0.75-Prunus-0.json", row(125_000, 41.4, SHAPES[1]))
    write(tmp_path / "0.5-from-scratch.json", {})
    *_, last = lines = half_the_tokens_rows.table(tmp_path).splitlines()
    assert "Minitron, 250k tokens | Prunus, 125k tokens" in lines[0]
    assert last == "| 0.5x | 0 | 84.0 (0.500) | 74.8 (0.500) |  |  | layers 3, ffn 4 | layers 2, ffn 8 |"
    assert len(lines) == 4  # head, rule, teacher, the one pair
