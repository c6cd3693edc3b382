"""What half_the_tokens.py measured, in Markdown: a line a size and seed, Minitron's recipe and Prunus's side by side.

Usage: python benchmarks/half_the_tokens_rows.py FOLDER

FOLDER is half_the_tokens.py's --rows (or --to). Of the shapes, the axes in which they differ.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from rows import markdown, read, shapes

RECIPES = ("Minitron", "Prunus")


def table(folder: Path) -> str:
    """Perplexity (KL to the teacher) on the held-out text and on the other, and the shapes; the teacher comes first."""
    keys = [path.stem.split(f"-{RECIPES[0]}-") for path in folder.glob(f"*-{RECIPES[0]}-*.json")]
    files = {(share, seed): [folder / f"{share}-{name}-{seed}.json" for name in RECIPES] for share, seed in keys}
    pairs = {key: list(map(read, pair)) for key, pair in files.items() if all(file.exists() for file in pair)}
    shape = shapes(row["architecture"] for pair in pairs.values() for row in pair)
    body = [
        [
            f"{share}x",
            seed,
            *(judged(row["distilled"]) for row in pairs[share, seed]),
            *(judged(row["beside"]) if "beside" in row else "" for row in pairs[share, seed]),
            *(shape[row["architecture"]] for row in pairs[share, seed]),
        ]
        for share, seed in sorted(pairs, key=lambda key: (-float(key[0]), int(key[1])))
    ]
    first = next(iter(pairs.values()))
    trained = [f"{name}, {row['tokens'] // 1000}k tokens" for name, row in zip(RECIPES, first, strict=True)]
    head = ["parameters", "seed", *trained, *(f"{name}: other text" for name in RECIPES), *RECIPES]
    teacher = ["1x (teacher)", "", judged(first[0]["teacher"]), *[""] * (len(head) - 3)]
    return markdown([head, teacher, *body])


def judged(model: Mapping[str, float]) -> str:
    return f"{model['perplexity']:.1f} ({model['kl_to_teacher']:.3f})"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
