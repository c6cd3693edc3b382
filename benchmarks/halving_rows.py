"""What halving.py measured, in Markdown: each candidate's place, what foretold it, and what the tournament cost.

Usage: python benchmarks/halving_rows.py FOLDER

FOLDER is halving.py's --rows (or --to).
"""

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rows import markdown, read, shapes
from scipy.stats import kendalltau


def table(folder: Path) -> str:
    """Candidates by their loss after training in full; below, Kendall's τ of each column with that order."""
    candidates, standings, full = read(folder / "candidates.json"), read(folder / "tournament.json"), trained(folder)
    losses = {name: row["loss"] for name, row in full.items()}
    order = sorted(losses, key=losses.__getitem__)
    known = next(iter(candidates.values()))
    columns = {when: {name: values[when] for name, values in candidates.items()} for when in known}
    short, whole = standings[order[0]]["tokens"][1], full[order[0]]["tokens"]
    columns[f"after {short:,} tokens"] = {name: standing["losses"][1] for name, standing in standings.items()}
    columns["place in the tournament"] = {name: place for place, name in enumerate(standings, 1)}
    shape = shapes(order)
    body = [[shape[name], *(shown(column[name]) for column in columns.values()), shown(losses[name])] for name in order]
    foretold = ["Kendall's τ", *(f"{tau(column, losses):.2f}" for column in columns.values()), ""]
    return markdown([["candidate", *columns, f"after {whole:,} tokens"], *body, foretold])


def summary(folder: Path) -> str:
    """Whether the tournament chose the best, by how much it may differ by chance, and what it cost."""
    standings, full = read(folder / "tournament.json"), trained(folder)
    losses = {name: row["loss"] for name, row in full.items()}
    best, winner = min(losses, key=losses.__getitem__), next(iter(standings))
    again = [read(row)["loss"] for row in folder.glob(f"{best}-*.json")]
    cost = sum(each["tokens"][-1] for each in standings.values()) / sum(row["tokens"] for row in full.values())
    named = {name: f"{shape} ({losses[name]:.4f})" for name, shape in shapes(losses).items()}
    said = [f"The tournament chose {named[winner]}, the best is {named[best]}.", f"It cost {cost:.0%} of training all."]
    if len(again) > 1:
        said.append(f"Of {len(again)} trainings of the best the standard deviation is {statistics.stdev(again):.4f}.")
    return " ".join(said)


def trained(folder: Path) -> dict[str, dict[str, Any]]:
    """Candidate → row of its training in full."""
    return {name: read(folder / f"{name}-0.json") for name in read(folder / "candidates.json")}


def tau(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    return float(kendalltau(list(first.values()), [second[name] for name in first]).statistic)


def shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), summary(Path(sys.argv[1])), sep="\n\n")
