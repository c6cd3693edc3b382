"""The pictures: each is drawn once, and belongs to the page that it stands in."""

import re

import numpy as np
import pytest
from matplotlib.axes import Axes

from prunus import pictures
from prunus.pictures import Picture

TEACHER = {"name": "teacher", "measured": {"loss": 2}, "costs": {"flops": 10}}
LAYERS, HEADS, HIDDEN, REMOVED = 80, 64, 8192, [40, 41]


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    """Of a large model, to see that the file stays small."""
    random = np.random.default_rng(0)
    kept = {layer: range(0, HEADS, 2) for layer in range(LAYERS) if layer not in REMOVED}
    curve = [{"tokens": 1000 * step, "loss": 3 / step + 0.1 * random.random()} for step in range(1, 2000)]
    scores_H = np.exp(random.normal(size=HIDDEN))
    tried = [
        {"predicted_damage": x, "measured": {"loss": 3 + x}, "chosen": x == 1, "costs": {"flops": 9 - x}}
        for x in range(4)
    ]
    return [
        pictures.layers(random.random(LAYERS).tolist(), random.random(LAYERS).tolist(), REMOVED),
        pictures.heads(random.random((LAYERS, HEADS)).tolist(), kept),
        pictures.hidden(scores_H.tolist(), np.sort(np.argsort(-scores_H)[: HIDDEN // 2]).tolist()),
        pictures.ffn(np.sort(np.exp(2 * random.normal(size=(LAYERS, 11)))).tolist(), REMOVED),
        pictures.training({"distilled": curve, "random init": curve}),
        pictures.candidates(tried),
        pictures.pareto([*tried, TEACHER], {"flops": ("FLOPs per token", str)}),
    ]


def test_captions_tell_the_outcome(drawn: list[Picture]) -> None:
    captions = " ".join(picture.caption for picture in drawn)
    assert "Removed: 40, 41." in captions
    assert "4,096 of 8,192 channels are kept" in captions
    assert "The 4 candidates that were tried." in captions


def test_pictures_do_not_disturb_each_other_or_the_theme(drawn: list[Picture]) -> None:
    svg = "".join(picture.svg for picture in drawn)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids)), "an id that two pictures share makes one draw the other's markers"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)
    assert "<style" not in svg
    assert not [colour for colour in pictures.THEME if colour in svg]
    assert not re.findall(r'<text style="[^"]*fill: #', svg), "text whose colour would not follow the theme"


def test_a_large_model_stays_a_small_file(drawn: list[Picture]) -> None:
    assert sum(len(picture.svg) for picture in drawn) < 1_000_000


def test_the_same_data_gives_the_same_picture() -> None:
    first, second = (pictures.layers([0.1, 0.3], None, []) for _ in range(2))
    assert first == second
    assert "No layer was removed." in first.caption


def test_the_front_is_what_nothing_beats_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[tuple[float, ...], ...]] = []
    monkeypatch.setattr(Axes, "step", lambda _, *across_and_up, **style: lines.append(across_and_up))
    points = [(1, 5), (2, 6), (3, 4), (4, 4.5)]
    tried = [{"measured": {"loss": loss}, "costs": {"flops": cost}} for cost, loss in points]
    pictures.pareto(tried, {"flops": ("FLOPs per token", str)})
    assert lines == [((1, 3), (5, 4))]


def test_the_share_of_importance_by_hand() -> None:
    assert "2 of 4 channels are kept; they hold 70.0 %" in pictures.hidden([1.0, 4.0, 2.0, 3.0], [1, 3]).caption
    assert "4 of 4 channels are kept; they hold 100.0 %" in pictures.hidden([1.0, 4.0, 2.0, 3.0], None).caption


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    points = [{"tokens": step, "loss": loss} for step, loss in enumerate((3.0, float("nan"), 2.0, float("inf"), 1.0))]
    assert "nan" not in pictures.training({"distilled": points}).svg
