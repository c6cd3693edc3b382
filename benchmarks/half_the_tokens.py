"""Minitron's recipe on T tokens beside Prunus's defaults on T/2, and beside random weights on many times as many.

Usage: python benchmarks/half_the_tokens.py MODEL --train TEXT --heldout FILE [--tokens 250k] [--shares 0.75,0.6,0.5]
       [--beside FILE] [--seeds 1] [--only Prunus] [--from-scratch 40] --to FOLDER [--rows FOLDER]

Both recipes search, cut and train by themselves (`recipes/minitron.yaml`, and no recipe at all), on the same text, with
as much of it for the scores, and are measured on the same held-out text. Further seeds of the first share take the
shape that the first seed found; they draw other calibration text and another order. --from-scratch N trains the shape
that Prunus found from random weights, on N times a tenth of T tokens, beside Prunus on a tenth of T. --beside FILE
measures the students on other text too. --only makes the runs of one recipe, so that the other's may go beside them in
another process. Runs lie in --to, what they measured in --rows (or there too); neither is made again.
"""

import argparse
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from half_the_tokens_rows import RECIPES, table
from rows import conditions, kept, read
from texts import tokenised

import prunus as pr
from prunus import hardware
from prunus import recipe as recipes
from prunus.budget import parse_quantity
from prunus.text import load_blocks

MINITRON = Path(__file__).parents[1] / "recipes" / "minitron.yaml"
FROM_SCRATCH_RATE = 1e-3
"""Random weights want a higher one."""
SCORING_TOKENS, HELDOUT_TOKENS, BESIDE_TOKENS = 32768, 49152, 16384


def run(options: argparse.Namespace, name: str, base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The row of a run: its architecture, and what it measured of each model, by its key."""
    return kept(options.rows / f"{name}.json", lambda: measured(options, name, base, **changes))


def measured(options: argparse.Namespace, name: str, base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changes = {key.replace("__", "."): value for key, value in changes.items()} | {
        "model": options.model,
        "to": str(options.to / name),
        "data.train": options.train,
        "data.heldout": options.heldout,
        "data.heldout_tokens": HELDOUT_TOKENS,
        "measure.tokens": SCORING_TOKENS,
        "evaluate.speed": False,
    }
    made = pr.compress(recipes.parse(recipes.override(base, changes), source=name))
    found = read(made.root / "5-report.json")
    seconds = sum(stage["seconds"] for stage in found["stages"])  # with those of a training that was stopped
    row = conditions() | {"tokens": changes["distill.tokens"], "seconds": seconds}
    row |= {model["key"]: model for model in found["models"]}
    row["architecture"] = str(pr.load(str(made.path("distill"))).architecture)
    return row | ({"beside": beside(options, name)} if options.beside else {})


def beside(options: argparse.Namespace, name: str) -> dict[str, float | None]:
    """What a finished run's student has on the other text."""
    teacher, student = pr.load(options.model), pr.load(str(options.to / name / "4-distilled"))
    blocks = tokenised(options.beside, teacher, BESIDE_TOKENS, options.to / "beside")
    dtype = hardware.compute_dtype()
    found = pr.quality(student.module(dtype), blocks, teacher=teacher.module(dtype))
    return {"perplexity": found.perplexity, "kl_to_teacher": found.kl_to_teacher}


def show(label: str, model: Mapping[str, Any]) -> None:
    print(f"{label:60} perplexity {model['perplexity']:8.2f}   KL {model['kl_to_teacher']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--beside")
    parser.add_argument("--tokens", type=parse_quantity, default=250_000)
    parser.add_argument("--shares", default="0.75,0.6,0.5")
    parser.add_argument("--seeds", type=int, default=1, help="for the first share")
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--from-scratch", type=int, default=0)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    options.rows = options.rows or options.to
    tokens = int(options.tokens)
    budgets = {"Minitron": tokens, "Prunus": tokens // 2}
    names = [options.only] if options.only else RECIPES
    for place, share in enumerate(options.shares.split(",")):
        seeds = range(options.seeds if place == 0 else 1)
        for seed, name in itertools.product(seeds, names):
            base: dict[str, Any] = recipes.read_yaml(MINITRON) if name == "Minitron" else {}
            changes: dict[str, Any] = {"distill__tokens": budgets[name], "distill__seed": seed}
            if seed:
                first = read(options.rows / f"{share}-{name}-0.json")
                base, changes = base | {"params": None}, changes | {"arch": first["architecture"]}
            else:
                changes["params"] = f"{share}x"
            found = run(options, f"{share}-{name}-{seed}", base, **changes)
            show(f"{share}x, seed {seed}: {name}, {budgets[name]:,} tokens", found["distilled"])
    if not options.only:
        print(table(options.rows), flush=True)
    if options.from_scratch:
        share, few = options.shares.split(",")[0], tokens // 10
        ours = run(options, f"{share}-few", {}, params=f"{share}x", distill__tokens=few)
        row = options.rows / f"{share}-from-scratch.json"
        scratch = kept(row, lambda: from_scratch(options, f"{share}-few", few * options.from_scratch))
        show(f"{share}x: Prunus, {few:,} tokens", ours["distilled"])
        print(
            f"{share}x: random weights, {scratch['tokens']:,} tokens: perplexity {scratch['perplexity']:.2f}",
            flush=True,
        )


def from_scratch(options: argparse.Namespace, name: str, tokens: int) -> dict[str, Any]:
    """Perplexity of a run's shape that learnt from the same teacher, from random weights."""
    teacher, folder = pr.load(options.model), options.to / "from-scratch"
    student, started = pr.load(str(options.to / name / "3-pruned")), time.monotonic()
    if not (folder / "model").exists():
        blocks = tokenised(options.train, teacher, tokens, folder / "text")
        settings = pr.Settings(tokens=tokens, learning_rate=FROM_SCRATCH_RATE)
        pr.distill(student, teacher, blocks, to=folder / "model", settings=settings, random_init=True)
    heldout = load_blocks(student.folder.parent / "0-text" / "heldout")
    third = len(heldout) // 3  # what the run searched with
    test = heldout.select(range(third, len(heldout)))
    perplexity = pr.quality(pr.load(str(folder / "model")).module(hardware.compute_dtype()), test).perplexity
    return conditions() | {"tokens": tokens, "seconds": time.monotonic() - started, "perplexity": perplexity}


if __name__ == "__main__":
    main()
