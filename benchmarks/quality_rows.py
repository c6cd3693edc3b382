"""The tables of what quality.py measured, in Markdown: one a size, the methods by their divergence after training.

Usage: python benchmarks/quality_rows.py FOLDER

FOLDER is quality.py's --rows (or --to): teacher.json and, for each size, a folder of row-*.json.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import markdown, read

CHANCE = {"ARC-Easy": 0.25, "HellaSwag": 0.25, "BLiMP": 0.5}


def main(folder: Path) -> None:
    teacher = read(folder / "teacher.json")
    for share in sizes(folder):
        print(f"\n## {share.name}x\n\n{table(share, teacher)}")


def sizes(folder: Path) -> list[Path]:
    """The folders of the sizes that were measured, the largest first."""
    return sorted((each for each in folder.iterdir() if any(each.glob("row-*.json"))), reverse=True)


def table(folder: Path, teacher: Mapping[str, Any]) -> str:
    """Markdown of one size's rows."""
    rows = sorted(map(read, folder.glob("row-*.json")), key=lambda row: mean_kl(row["after"]))
    texts, tasks = list(teacher["before"]), [name for name in CHANCE if any(name in row["tasks"] for row in rows)]
    stages = ("cut", f"{rows[0]['tokens'] // 1000}k tokens")
    measured = [f"{Path(text).stem}: {stage}" for stage in stages for text in texts]
    heads = ["method", "parameters", *measured, "rate", *tasks]
    first = [*cells(teacher, texts), *(accuracy(teacher["tasks"][name]) for name in tasks)]
    lines = [[*cells(row, texts), *(kept(row["tasks"], teacher["tasks"], name) for name in tasks)] for row in rows]
    return markdown([heads, first, *lines])


def cells(row: Mapping[str, Any], texts: Iterable[str]) -> list[str]:
    found = [judged(row[when][text]) if when in row else "" for when in ("before", "after") for text in texts]
    rate = f"{row['rate']:.0e}" if row.get("rate") else ""
    return [row["method"], f"{row['parameters'] / 1e6:.1f}M", *found, rate]


def judged(each: Mapping[str, float]) -> str:
    perplexity = each["perplexity"]
    return f"{perplexity:{',.1f' if perplexity < 1e5 else '.0e'}} ({each['kl']:.3f})"


def accuracy(measured: Sequence[float]) -> str:
    return f"{measured[0]:.1%} ± {1.96 * measured[1]:.1%}"


def kept(student: Mapping[str, Sequence[float]], teacher: Mapping[str, Sequence[float]], task: str) -> str:
    """Share of the teacher's accuracy above chance, ± 1.96 standard errors of the student's; empty if not measured."""
    if task not in student:
        return ""
    above = teacher[task][0] - CHANCE[task]
    return f"{(student[task][0] - CHANCE[task]) / above:.0%} ± {1.96 * student[task][1] / above:.0%}"


def mean_kl(judged: Mapping[str, Mapping[str, float]]) -> float:
    """Over the held-out texts."""
    return sum(each["kl"] for each in judged.values()) / len(judged)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
