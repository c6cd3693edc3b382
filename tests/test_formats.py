"""Numbers as people read them."""

import math
from collections.abc import Callable

import pytest

from prunus import formats


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        (formats.count, 134_515_008, "134.5M"),
        (formats.count, 999_999_999, "1B"),
        (formats.count, 250_000, "250K"),
        (formats.count, 9999, "9,999"),
        (formats.count, 0, "0"),
        (formats.byte_size, 269_060_552, "269 MB"),
        (formats.byte_size, 999_700, "1 MB"),
        (formats.number, 28.51, "28.5"),
        (formats.number, 999.6, "1,000"),
        (formats.number, math.nan, "–"),
        (formats.number, math.inf, "∞"),
        (formats.number, None, "–"),
        (formats.percent, 0.6123, "61.2 %"),
        (formats.points, -0.028, "−2.8 pt"),
        (formats.times, 0.7, "0.70×"),
        (formats.times, 1234.5, "1,234×"),
        (formats.seconds, 59.99, "60.0 s"),
        (formats.seconds, 250, "4 min 10 s"),
        (formats.seconds, 5230, "1 h 27 min"),
    ],
)
def test_numbers_as_people_read_them(form: Callable[[float | None], str], value: float | None, words: str) -> None:
    assert form(value) == words


def test_accuracy_with_and_without_its_error() -> None:
    assert formats.accuracy(0.412, 0.01) == "41.2 ± 1.0 %"
    assert formats.accuracy(0.412, None) == "41.2 %"
    assert formats.accuracy(None, None) == "–"


@pytest.mark.parametrize(
    ("new", "old", "expected"), [(3, 2, 1.5), (0, 2, 0), (1, 0, None), (None, 1, None), (math.inf, 1, None)]
)
def test_ratio(new: float | None, old: float | None, expected: float | None) -> None:
    assert formats.ratio(new, old) == expected
