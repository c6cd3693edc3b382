"""The rows of quality.py as a picture: how far each method's student is from its teacher, as cut and as trained.

Usage: python benchmarks/quality_picture.py FOLDER FILE
"""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from quality_rows import mean_kl, sizes, table
from rows import read

OURS = "Prunus"
GREY, ORANGE = "#808080", "#de7012"  # on light pages and on dark ones
TICKS = (0.5, 1, 2, 5, 10)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": OURS,
    "text.color": GREY,
    "font.size": 9,
    "axes.labelcolor": GREY,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "ytick.major.size": 0,
    "figure.constrained_layout.use": True,
}


def main(folder: Path, file: Path) -> None:
    with matplotlib.rc_context(STYLE):
        picture(folder).savefig(file, transparent=True, metadata={"Date": None, "Description": digest(folder)})


def digest(folder: Path) -> str:
    """Of the rows, so that a picture tells which ones it was made of."""
    teacher = read(folder / "teacher.json")
    return hashlib.sha256("\n".join(table(each, teacher) for each in sizes(folder)).encode()).hexdigest()


def picture(folder: Path) -> Figure:
    """A panel a size; the methods by their divergence after training, over the sizes."""
    shares = sizes(folder)
    panels = [{row["method"]: row for row in map(read, share.glob("row-*.json"))} for share in shares]
    found = {name: [after(rows[name]) for rows in panels if name in rows] for name in set().union(*panels)}
    methods = sorted(found, key=lambda name: -fmean(found[name]))
    figure = Figure(figsize=(9, 0.8 + 0.22 * len(methods)))
    places = figure.subplots(1, len(shares), sharex=True, sharey=True)
    for axes, share, rows in zip(places, shares, panels, strict=True):
        panel(axes, methods, rows)
        axes.set_title(f"{share.name}× the parameters", fontsize=9)
    figure.supxlabel("KL to the teacher, nats per token", fontsize=9)
    return figure


def after(row: Mapping[str, Any]) -> float:
    return mean_kl(row["after"])


def panel(axes: Axes, methods: list[str], rows: dict[str, dict[str, Any]]) -> None:
    """A line per method: from the cut student, hollow, to the trained one."""
    axes.set_xscale("log")
    axes.set_xticks(TICKS, map(str, TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(methods)), methods)
    for place, method in enumerate(methods):
        if method in rows:
            colour, row = ORANGE if method == OURS else GREY, rows[method]
            axes.plot([mean_kl(row["before"]), after(row)], [place, place], color=colour, linewidth=1)
            axes.plot(mean_kl(row["before"]), place, "o", markerfacecolor="white", color=colour, markersize=5)
            axes.plot(after(row), place, "o", color=colour, markersize=5)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
