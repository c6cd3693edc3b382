"""Successive halving beside all candidates trained in full: does it pick the best, what does it cost, what tells early?

Usage: python benchmarks/halving.py MODEL --train TEXT --heldout FILE [--share 0.7] [--candidates 12] [--tokens 100k]
       [--seeds 3] --to FOLDER

Candidates are those of the search, cut and repaired. Each is distilled on all tokens from one cache of samples of the
teacher; the best with several seeds, which tells how far two trainings of the same differ by chance. Then they play a
tournament on the same text. Kendall's τ with the order after full training is given for every earlier order. Trainings
lie in FOLDER and are not made again.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from texts import BLOCK_SIZE, tokenised

import prunus as pr
from prunus import hardware
from prunus.budget import parse_quantity
from prunus.checkpoint import load
from prunus.prune import build, cut
from prunus.schedule import Settings
from prunus.search import Candidate
from prunus.teacher import Cache, describe, write_cache
from prunus.tournament import rounds, tournament

CALIBRATION_BLOCKS, VALIDATION_TOKENS, TEST_TOKENS = 64, 16384, 32768


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """τ: pairs in the same order less pairs in the other, as a share of all pairs."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    signs = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs)


class Bench:
    """Text, candidates and trainings, in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.to
        self.teacher = pr.load(options.model)
        tokens = int(options.tokens)
        most = tokens + CALIBRATION_BLOCKS * BLOCK_SIZE
        text = tokenised(options.train, self.teacher, most, self.folder / "train")
        most = VALIDATION_TOKENS + TEST_TOKENS
        heldout = tokenised(options.heldout, self.teacher, most, self.folder / "heldout")
        self.calibration = text.head(CALIBRATION_BLOCKS)
        self.train = text.select(range(CALIBRATION_BLOCKS, len(text)))
        border = VALIDATION_TOKENS // BLOCK_SIZE
        self.validation, self.test = heldout.head(border), heldout.select(range(border, len(heldout)))
        self.scores = pr.score(pr.measure(self.teacher, self.calibration))
        budget = pr.parse_budget(self.teacher, params=f"{options.share}x")
        found = pr.search(
            self.teacher,
            self.scores,
            budget,
            calibration=self.calibration,
            heldout=self.validation,
            candidates=options.candidates,
        )
        self.candidates = [candidate for candidate in found.candidates if candidate.measured]

    def cache(self) -> Cache:
        return write_cache(self.teacher, self.train, describe(self.teacher, self.train), to=self.folder / "cache")

    def student(self, candidate: Candidate) -> pr.Checkpoint:
        to = self.folder / "students" / str(candidate.architecture)
        if to.is_dir():
            return load(to)
        return pr.prune(self.teacher, self.scores, candidate.architecture, to=to, calibration=self.calibration)

    def sliced(self, candidate: Candidate) -> float:
        """Held-out loss before the repair."""
        model = build(cut(self.teacher, self.scores, candidate.architecture), hardware.compute_dtype())
        return pr.quality(hardware.place(model, device=hardware.device()), self.validation).loss

    def trained(self, candidate: Candidate, seed: int) -> float:
        """Test loss after all tokens."""
        to = self.folder / "trained" / f"{candidate.architecture}-{seed}"
        if not to.is_dir():
            settings = Settings(tokens=self.train.num_tokens, seed=seed)
            pr.distill(self.student(candidate), self.cache(), self.train, to=to, settings=settings)
        return pr.quality(load(to).module(hardware.compute_dtype(), hardware.device()), self.test).loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--tokens", type=parse_quantity, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    hardware.keep_freed_memory()
    bench = Bench(options)
    names = [str(candidate.architecture) for candidate in bench.candidates]
    with torch.no_grad():
        sliced = [bench.sliced(candidate) for candidate in bench.candidates]
    full = []
    for candidate in bench.candidates:
        full.append(bench.trained(candidate, seed=0))
        print(f"{candidate.architecture}: trained in full, loss {full[-1]:.4f}", flush=True)
    best = min(range(len(full)), key=full.__getitem__)
    again = [full[best], *(bench.trained(bench.candidates[best], seed) for seed in range(1, options.seeds))]
    standings = tournament(
        bench.teacher,
        dict(zip(names, map(bench.student, bench.candidates), strict=True)),
        bench.train,
        bench.validation,
        to=bench.folder / "tournament",
        tokens=bench.train.num_tokens,
    )
    show(bench, names, sliced, full, again, [names.index(name) for name in standings])


def show(
    bench: Bench,
    names: list[str],
    sliced: list[float],
    full: list[float],
    again: list[float],
    order: list[int],
) -> None:
    tokens = bench.train.num_tokens
    plan = rounds(len(names), tokens)
    starts = [0, *(end for _, end in plan)]
    spent = sum(count * (end - start) for (count, end), start in zip(plan, starts, strict=False))
    best, winner = min(full), full[order[0]]
    repaired = [candidate.measured.loss for candidate in bench.candidates if candidate.measured]
    orders = {
        "predicted": [candidate.predicted_damage for candidate in bench.candidates],
        "before the repair": sliced,
        "after the repair": repaired,
        "tournament": [order.index(number) for number in range(len(names))],
    }
    result = {
        "best": names[full.index(best)],
        "best_loss": best,
        "winner": names[order[0]],
        "winner_loss": winner,
        "noise": statistics.stdev(again) if len(again) > 1 else None,
        "cost": spent / (len(names) * tokens),
        "kendall": {name: kendall(values, full) for name, values in orders.items()},
    }
    print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
