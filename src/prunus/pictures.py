"""The pictures of the report, as SVG inside the page.

Shapes: L layers of what was cut, A query heads, H hidden channels, Q quantiles.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prunus import formats

POINTS_SHOWN = 400
SIZE = (5, 2.7)  # inches, of text that is 9 points high

# Matplotlib draws in these placeholders; the page replaces them by its own colours, so one SVG suits light and dark.
INK, MUTED, GRID, KEPT, REMOVED, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
THEME = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}
THEME |= {KEPT: "var(--kept)", REMOVED: "var(--removed)", OTHER: "var(--other)"}
NAMED = {"teacher": INK, "uncut": INK, "chosen": REMOVED}
KEPT_RGB, REMOVED_RGB = (0.18, 0.53, 0.78), (0.87, 0.44, 0.07)
"""For pictures made of pixels, which cannot follow the theme. Blue and orange: colour-blind eyes tell them apart."""

STYLE: Any = {
    "svg.fonttype": "none",  # real text in the page's own font
    "svg.hashsalt": "prunus",  # the same picture gets the same ids
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}
styled = matplotlib.rc_context(STYLE)


@dataclass(frozen=True)
class Picture:
    title: str
    svg: Markup
    caption: str


@styled
def layers(scores_L: Sequence[float], leave_one_out_L: Sequence[float] | None, removed: Collection[int]) -> Picture:
    panels = {"importance": scores_L}
    if leave_one_out_L:
        panels["damage when left out"] = leave_one_out_L
    figure, rows = _layer_panels(len(panels))
    for axes, (name, values) in zip(rows, panels.items(), strict=True):
        colours = [REMOVED if layer in removed else KEPT for layer in range(len(values))]
        axes.bar(range(len(values)), values, color=colours)
        axes.set_ylabel(name)
    gone = f"Removed: {', '.join(map(str, removed))}." if removed else "No layer was removed."
    return _picture(figure, "Layers", f"How much each layer matters. {gone}")


@styled
def heads(scores_LA: Sequence[Sequence[float]], kept: Mapping[int, Sequence[int]] | None) -> Picture:
    """A square for each query head. `kept`: layer → its kept heads; None: all."""
    scores, stays = np.array(scores_LA), np.full_like(scores_LA, kept is None, dtype=bool)
    for layer, indices in (kept or {}).items():
        stays[layer, indices] = True
    strongest = scores.max(axis=1, keepdims=True)
    pixels = np.empty((*scores.shape, 4))
    pixels[..., :3] = np.where(stays[..., None], KEPT_RGB, REMOVED_RGB)
    pixels[..., 3] = 0.12 + 0.88 * np.clip(scores / np.where(strongest > 0, strongest, 1), 0, 1)
    figure, (axes,) = _layer_panels(1)
    axes.imshow(pixels.transpose(1, 0, 2), aspect="auto", interpolation="none", origin="lower")
    gone_layer, gone_head = np.nonzero(~stays)
    # One polyline for all the crosses: a marker for each would be most of the page.
    across, up = np.array([[-1, 1, np.nan, -1, 1, np.nan], [-1, 1, np.nan, 1, -1, np.nan]]) / 4
    axes.plot(np.add.outer(gone_layer, across).ravel(), np.add.outer(gone_head, up).ravel(), color=INK, linewidth=0.5)
    axes.set_ylabel("query head")
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    caption = "Stronger colour: more important, against the strongest head of its layer. Crossed out: removed."
    return _picture(figure, "Attention heads", caption)


@styled
def hidden(scores_H: Sequence[float], kept: Sequence[int] | None) -> Picture:
    values, is_kept = np.array(scores_H), np.full(len(scores_H), kept is None, dtype=bool)
    is_kept[kept or []] = True
    order = np.argsort(-values, kind="stable")
    bins = np.array_split(order, min(len(order), POINTS_SHOWN))
    edges = np.cumsum([0, *map(len, bins)])
    height = np.array([values[part].mean() for part in bins])
    stays = np.array([is_kept[part].mean() >= 0.5 for part in bins])
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    bottom = _log_if_wide(axes, values)
    for mask, colour in ((stays, KEPT), (~stays, REMOVED)):
        axes.stairs(np.where(mask, height, bottom), edges, baseline=bottom, fill=True, color=colour)
    axes.set(xlabel="channels, the most important first", ylabel="importance")
    share = formats.percent(values[is_kept].sum() / values.sum())
    caption = f"{is_kept.sum():,} of {len(values):,} channels are kept; they hold {share} of the importance."
    return _picture(figure, "Hidden channels", caption)


@styled
def ffn(quantiles_LQ: Sequence[Sequence[float]], removed: Collection[int]) -> Picture:
    """Quantiles of the neurons' scores in each layer, lowest to highest, with the median in the middle."""
    quantiles_QL = np.array(quantiles_LQ).T
    figure, (axes,) = _layer_panels(1)
    bottom, layers = _log_if_wide(axes, quantiles_QL), range(quantiles_QL.shape[1])
    middle = len(quantiles_QL) // 2
    for low, high in zip(quantiles_QL[:middle], quantiles_QL[:middle:-1], strict=True):
        low, high = np.maximum([low, high], bottom)
        axes.fill_between(layers, low, high, color=KEPT, alpha=0.16, linewidth=0, step="mid")
    axes.step(layers, quantiles_QL[middle], color=KEPT, where="mid")
    axes.set_ylabel("importance")
    for layer in removed:
        axes.axvspan(layer - 0.5, layer + 0.5, color=REMOVED, alpha=0.25, linewidth=0)
    caption = "Importance of the neurons of each layer: median, and bands from the middle fifth out to the extremes."
    return _picture(figure, "Feed-forward neurons", caption + " Orange: removed layers." * bool(removed))


@styled
def training(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """Loss over tokens. One curve or two: name → points with `tokens` and `loss`."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), (KEPT, OTHER), strict=False):
        tokens, loss = (np.array([point[key] for point in points], dtype=float) for key in ("tokens", "loss"))
        span = max(1, min(20, len(points) // 10))
        mean = np.convolve(loss, np.full(span, 1 / span), "valid")
        _thin_line(axes, tokens, loss, color=colour, alpha=0.3, linewidth=0.8)
        _thin_line(axes, tokens[span - 1 :], mean, color=colour, label=name)
    axes.set(xlabel="million tokens", ylabel="training loss")
    caption = "Thin: each logged step. Bold: moving average."
    if len(curves) > 1:
        axes.legend()
        caption += " The two losses are comparable only where both runs minimise the same one."
    return _picture(figure, "Training loss", caption)


@styled
def candidates(tried: Sequence[Mapping[str, Any]]) -> Picture:
    """Measured loss over predicted damage, a point for each candidate that was tried."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for candidate in tried:
        point, colour = (candidate["predicted_damage"], candidate["measured"]["loss"]), KEPT
        if candidate["chosen"]:
            colour = REMOVED
            axes.annotate("chosen", point, xytext=(6, 5), textcoords="offset points")
        axes.scatter(*point, s=34, color=colour, alpha=0.85, linewidth=0)
    axes.set(xlabel="predicted damage", ylabel="measured loss")
    return _picture(figure, "Predicted and measured", f"The {len(tried)} candidates that were tried.")


@styled
def pareto(tried: Sequence[Mapping[str, Any]], against: Mapping[str, tuple[str, Callable[[float], str]]]) -> Picture:
    """Measured loss over what candidates cost, a line through those that no other beats in both.

    Args:
        tried: some may have a name that stands beside them.
        against: key of `costs` → what its panel is called, and how its numbers are written.
    """
    figure = Figure(figsize=SIZE)
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for axes, (kind, (label, form)) in zip(panels, against.items(), strict=True):
        points = sorted((each["costs"][kind], each["measured"]["loss"]) for each in tried)
        losses = np.minimum.accumulate([loss for _, loss in points])
        front = [point for point, least in zip(points, losses, strict=True) if point[1] <= least]
        if front:  # of no finite loss there is none
            axes.step(*zip(*front, strict=True), where="post", color=KEPT, linewidth=1, alpha=0.6)
        for each in tried:
            name, point = each.get("name", ""), (each["costs"][kind], each["measured"]["loss"])
            axes.scatter(*point, s=34, color=NAMED.get(name, KEPT), alpha=0.85, linewidth=0)
            axes.annotate(name, point, xytext=(-6, 6), textcoords="offset points", ha="right")
        axes.set(xlabel=label)
        axes.margins(x=0.25)  # for the names
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.xaxis.set_major_formatter(lambda value, _, form=form: form(value))
    panels[0].set_ylabel("measured loss")
    return _picture(figure, "Quality against size and speed", "The line joins what nothing smaller or faster beats.")


def _layer_panels(count: int) -> tuple[Figure, np.ndarray]:
    """Panels above each other whose common x axis is the layers of what was cut."""
    figure = Figure(figsize=(5, 1.5 + 1.2 * count))
    rows = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    rows[-1].set_xlabel("layer before the cut")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, rows


def _log_if_wide(axes: Axes, values: np.ndarray) -> float:
    """Log scale where a linear one would show only the outliers. Returns where the axis begins."""
    positive = values[values > 0]
    if not len(positive) or positive.max() < 100 * np.quantile(positive, 0.01):
        return min(0.0, float(values.min()))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default writes powers of ten in TeX
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    bottom = 0.8 * max(positive.min(), positive.max() * 1e-6)
    axes.set_ylim(bottom, 1.5 * positive.max())
    return float(bottom)


def _thin_line(axes: Axes, tokens: np.ndarray, loss: np.ndarray, **style: Any) -> None:
    shown = np.unique(np.linspace(0, len(tokens) - 1, POINTS_SHOWN).astype(int))
    axes.plot(tokens[shown] / 1e6, loss[shown], **style)


def _picture(figure: Figure, title: str, caption: str) -> Picture:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return Picture(title, _inline(stream.getvalue(), title), caption)


def _inline(svg: str, title: str) -> Markup:
    """An SVG file → an element of the page: smaller, themed, with ids of its own."""
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.S)  # would style the whole page
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg role="img" aria-label="{title}" \1>', svg, count=1)
    for placeholder, colour in THEME.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg)
