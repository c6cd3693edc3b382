"""Successive halving beside all candidates trained in full: does it pick the best, what does it cost, what tells early?

Usage: python benchmarks/halving.py MODEL --train TEXT --heldout FILE [--share 0.7] [--candidates 12] [--tokens 100k]
       [--seeds 3] [--workers 1] --to FOLDER [--rows FOLDER]

Candidates are those of the search, cut and repaired. Each is distilled on all tokens from one cache of samples of the
teacher; the best with several seeds, which tells how far two trainings of the same differ by chance. Then they play a
tournament on the same text. Kendall's τ with the order after full training is given for every earlier order. Students
lie in --to, what was measured in --rows (or there too); neither is made again. Several --workers train side by side, on
Ray.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from halving_rows import summary, table
from rows import conditions, kept, read, write
from texts import BLOCK_SIZE, tokenised

import prunus as pr
from prunus import hardware, side_by_side
from prunus.architecture import parse
from prunus.budget import parse_quantity
from prunus.checkpoint import load
from prunus.prune import build, cut
from prunus.schedule import Settings
from prunus.teacher import Cache, describe, open_cache, write_cache
from prunus.text import Blocks
from prunus.tournament import tournament

CALIBRATION_BLOCKS, VALIDATION_TOKENS, TEST_TOKENS = 64, 16384, 32768


@dataclass(frozen=True)
class Training:
    """One candidate on all tokens, so that any process can do it."""

    student: Path
    cache: Path
    train: Blocks
    test: Blocks
    seed: int
    to: Path


def trained(training: Training) -> dict[str, Any]:
    """Loss on the test text."""
    started, tokens = time.monotonic(), training.train.num_tokens
    if not training.to.is_dir():
        settings, teacher = Settings(tokens=tokens, seed=training.seed), open_cache(training.cache)
        pr.distill(load(training.student), teacher, training.train, to=training.to, settings=settings)
    model = load(training.to).module(hardware.compute_dtype(), hardware.device())
    loss = pr.quality(model, training.test).loss
    return conditions() | {"tokens": tokens, "seconds": time.monotonic() - started, "loss": loss}


class Bench:
    """Text, candidates and trainings, in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.to
        self.rows: Path = options.rows or options.to
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
        self.share, self.most, self.workers = options.share, options.candidates, options.workers
        self.candidates: dict[str, dict[str, float]] = kept(self.rows / "candidates.json", self.searched)

    @functools.cached_property
    def scores(self) -> pr.Scores:
        return pr.score(pr.measure(self.teacher, self.calibration))

    def searched(self) -> dict[str, dict[str, float]]:
        """Of each candidate what is known before any training: the predicted damage, and held-out losses."""
        budget = pr.parse_budget(self.teacher, params=f"{self.share}x")
        found = pr.search(
            self.teacher,
            self.scores,
            budget,
            calibration=self.calibration,
            heldout=self.validation,
            candidates=self.most,
        )
        return {
            str(candidate.architecture): {
                "predicted": candidate.predicted_damage,
                "before the repair": self.sliced(candidate.architecture),
                "after the repair": candidate.measured.loss,
            }
            for candidate in found.candidates
            if candidate.measured
        }

    @torch.no_grad()
    def sliced(self, architecture: pr.Architecture) -> float:
        """Held-out loss before the repair."""
        model = build(cut(self.teacher, self.scores, architecture), hardware.compute_dtype())
        return pr.quality(hardware.place(model, device=hardware.device()), self.validation).loss

    def cache(self) -> Cache:
        return write_cache(self.teacher, self.train, describe(self.teacher, self.train), to=self.folder / "cache")

    def student(self, name: str) -> pr.Checkpoint:
        to = self.folder / "students" / name
        if to.is_dir():
            return load(to)
        architecture = parse(name, self.teacher.architecture)
        return pr.prune(self.teacher, self.scores, architecture, to=to, calibration=self.calibration)

    def trained(self, wanted: Sequence[tuple[str, int]]) -> list[float]:
        """Test losses of (candidate, seed) after all tokens."""
        rows = {(name, seed): self.rows / f"{name}-{seed}.json" for name, seed in wanted}
        trainings = {
            str(rows[name, seed]): Training(
                student=self.student(name).folder,
                cache=self.cache().folder,
                train=self.train,
                test=self.test,
                seed=seed,
                to=self.folder / "trained" / f"{name}-{seed}",
            )
            for name, seed in wanted
            if not rows[name, seed].exists()
        }
        for file, row in side_by_side.each(trained, trainings, workers=self.workers):
            write(Path(file), row)
            print(f"{file}: loss {row['loss']:.4f}", flush=True)
        return [read(row)["loss"] for row in rows.values()]

    def standings(self) -> dict[str, dict[str, list[float]]]:
        """Of each candidate the tokens and held-out losses, before and after each round it took part in; best first."""
        found = tournament(
            self.teacher,
            {name: self.student(name) for name in self.candidates},
            self.train,
            self.validation,
            to=self.folder / "tournament",
            tokens=self.train.num_tokens,
            workers=self.workers,
        )
        return {name: asdict(standing) for name, standing in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--tokens", type=parse_quantity, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    hardware.keep_freed_memory()
    bench = Bench(options)
    full = dict(zip(bench.candidates, bench.trained([(name, 0) for name in bench.candidates]), strict=True))
    best = min(full, key=full.__getitem__)
    bench.trained([(best, seed) for seed in range(options.seeds)])
    kept(bench.rows / "tournament.json", bench.standings)
    print(table(bench.rows), summary(bench.rows), sep="\n\n", flush=True)


if __name__ == "__main__":
    main()
