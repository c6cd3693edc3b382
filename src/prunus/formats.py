"""Numbers as people read them. One that is missing or NaN becomes a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def ratio(new: float | None, old: float | None) -> float | None:
    """new / old, or None where one of them is unknown, not finite, or 0 below the line."""
    new, old = finite(new), finite(old)
    return new / old if new is not None and old else None


def _or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    def formatted(value: float | None) -> str:
        if value is None or math.isnan(value):
            return "–"
        return "∞" if math.isinf(value) else form(value)

    return formatted


def _scaled(value: float, units: Sequence[str]) -> tuple[float, str]:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return value, units[power]


@_or_dash
def count(value: float) -> str:
    """134515008 → 134.5M; below ten thousand in full."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    scaled, unit = _scaled(value, ("", "K", "M", "B", "T"))
    return f"{scaled:.1f}".removesuffix(".0") + unit


@_or_dash
def byte_size(value: float) -> str:
    scaled, unit = _scaled(value, ("B", "kB", "MB", "GB", "TB"))
    return f"{scaled:.3g} {unit}"


@_or_dash
def number(value: float) -> str:
    """Three significant digits, the last one shown even when it is 0."""
    return f"{value:,.0f}" if abs(value) >= 999.5 or value == 0 else f"{value:#.3g}".rstrip(".")


@_or_dash
def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def accuracy(share: float | None, standard_error: float | None) -> str:
    """`41.2 ± 1.0 %`, or without the error where that is unknown."""
    error = "" if standard_error is None else f" ± {100 * standard_error:.1f}"
    return percent(share).replace(" %", f"{error} %")


@_or_dash
def points(value: float) -> str:
    """A difference of two shares."""
    return f"{100 * value:+.1f} pt".replace("-", "−")


@_or_dash
def times(value: float) -> str:
    return f"{value:.2f}×" if value < 9.995 else f"{value:,.0f}×"


@_or_dash
def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
