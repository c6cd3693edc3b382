"""What a run holds, on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from prunus import formats
from prunus.recipe import STAGES
from prunus.results import FAMILY, chosen
from prunus.run import Run, read_json


def show(run: Run) -> None:
    """Print what a run holds, for a reader."""
    out = Console(highlight=False, markup=False)
    if run.finished("evaluate"):
        table = Table(box=None, header_style="bold")
        for heading in ("", "parameters", "perplexity", "bits/byte", "KL", "top-1"):
            table.add_column(heading, no_wrap=True, justify="left" if not heading else "right")
        for model in read_json(run.path("evaluate"))["models"]:
            table.add_row(
                model["label"],
                f"{model['parameters'] / 1e6:,.1f}M",
                f"{model['perplexity']:.2f}",
                f"{model['bits_per_byte']:.3f}",
                f"{model['kl_to_teacher']:.3f}",
                f"{model['top1_agreement']:.1%}",
            )
        out.print(table)
    elif run.finished("search"):
        entry = next(entry for entry in run.candidates["candidates"] if entry["chosen"])
        out.print(f"{chosen(run.candidates, run.parent)}: {entry['parameters']:,} parameters")
    if run.finished("search") and (note := run.candidates["budget"]["note"]):
        out.print(f"Note: {note}")
    last = max((stage for stage in STAGES if run.finished(stage)), key=STAGES.index)
    out.print(f"Wrote {run.path(last)}", soft_wrap=True)


def show_family(root: Path) -> None:
    """Print what the runs of several sizes hold, for a reader."""
    family = read_json(root / FAMILY)
    table = Table(box=None, header_style="bold")
    for heading in ("", "parameters", "perplexity", "KL"):
        table.add_column(heading, no_wrap=True, justify="left" if not heading else "right")
    for size in (family["teacher"], *family["sizes"]):
        quality = (f"{size['perplexity']:.2f}", f"{size['kl_to_teacher']:.3f}")
        table.add_row(size["name"], formats.count(size["parameters"]), *quality)
    out = Console(highlight=False, markup=False)
    out.print(table)
    out.print(f"Wrote {root / 'report.html'}", soft_wrap=True)
