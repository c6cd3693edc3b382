"""Every published method beside Prunus, at the same parameters, on the same model, text and tokens.

Usage: python benchmarks/quality.py MODEL --train TEXT --calibration TEXT --heldout FILE [--heldout FILE]
       [--shares 0.8,0.67,0.5] [--tokens 100k] [--rates 1.5e-4,3e-4] [--only "FLAP;Prunus"]
       [--tasks FOLDER] [--limit N] --to FOLDER [--rows FOLDER]

Each row is measured without any training, and after distillation on the same tokens with Prunus's own loop and
settings, of several learning rates the best: what differs is the student alone. A row is written when it is done, and
not made again; the table (quality_rows.py) is made of those that are there. Calibration, training and held-out text
must be different files. With --tasks FOLDER, which holds arc_easy_test.jsonl, hellaswag_val.jsonl and
blimp_50each.jsonl, the share of the teacher's accuracy above chance that is kept, ± 1.96 standard errors of the
student's accuracy. Text and cache lie in --to, rows and shapes in --rows: there too, where it is not given.
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from published import METHODS, PACKAGES, Bench, Inapplicable
from published.bench import count
from quality_rows import CHANCE, mean_kl, table
from rows import conditions, kept, write
from texts import BLOCK_SIZE, tokenised
from transformers import PreTrainedModel

import prunus as pr
from prunus import anatomy, hardware
from prunus.budget import parse_quantity
from prunus.checkpoint import from_config
from prunus.head import head_of
from prunus.masters import Masters
from prunus.measure import load_statistics, save_statistics
from prunus.prune import cut, repaired
from prunus.schedule import Settings, learning_rate, plan
from prunus.step import Losses, accumulate
from prunus.tasks import LocalTask, run_tasks
from prunus.teacher import Cache, Live, describe, write_cache
from prunus.text import Blocks, targets
from prunus.weight_size import size_of

MICRO_BLOCKS = 2
ROWS_OF_LOGITS = 256
SCORING_TOKENS, CALIBRATION_TOKENS = 32768, 131072
"""What Prunus measures and what it repairs on, by default; every method that fits something may use all of it."""
VALIDATION_TOKENS, HELDOUT_TOKENS = 16384, 16384
OURS, RANDOM_INIT = "Prunus", "random init, the shape of Prunus"
Judged = dict[str, dict[str, float]]
"""Held-out text → perplexity, kl."""


def tasks(folder: Path) -> dict[str, LocalTask]:
    hellaswag = "{{activity_label}}: {{ctx}}"
    found = {
        "ARC-Easy": LocalTask("arc_easy", folder / "arc_easy_test.jsonl", "{{query}}", "choices", "gold"),
        "HellaSwag": LocalTask("hellaswag", folder / "hellaswag_val.jsonl", hellaswag, "endings", "label"),
        "BLiMP": LocalTask("blimp", folder / "blimp_50each.jsonl", "", ("sentence_good", "sentence_bad"), 0),
    }
    return {name: found[name] for name in CHANCE}


class Laboratory:
    """Text, teacher and its cache; made once in the folder, whatever the rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.to
        self.rows: Path = options.rows or options.to
        self.teacher = pr.load(options.model)
        self.train = self._text("train", options.train, int(options.tokens))
        calibration = self._text("calibration", options.calibration, CALIBRATION_TOKENS + VALIDATION_TOKENS)
        border, end = SCORING_TOKENS // BLOCK_SIZE, (SCORING_TOKENS + VALIDATION_TOKENS) // BLOCK_SIZE
        self.scoring, self.validation = calibration.head(border), calibration.select(range(border, end))
        self.calibration = calibration.select([*range(border), *range(end, len(calibration))])
        self.heldout = {Path(file).name: self._text(Path(file).name, file, HELDOUT_TOKENS) for file in options.heldout}
        self.rates = [float(rate) for rate in options.rates.split(",")] if options.rates else [None]

    def _text(self, name: str, file: str, tokens: int) -> Blocks:
        return tokenised(file, self.teacher, tokens, self.folder / "text" / name)

    def cache(self, name: str, blocks: Blocks) -> Cache:
        """The teacher's states on a text."""
        to = self.folder / "cache" / name
        return write_cache(self.teacher, blocks, describe(self.teacher, blocks, kind="hidden"), to=to)

    def judged(self, model: PreTrainedModel) -> Judged:
        """In the training dtype: perplexity and divergence on each held-out text."""
        model = hardware.place(model, dtype=hardware.compute_dtype()).eval()
        return {name: compared(model, self.cache(name, blocks), blocks) for name, blocks in self.heldout.items()}

    def bench(self, share: float) -> Bench:
        """One size: Prunus's search is part of it."""
        statistics = self._statistics()
        scores = pr.score(statistics)
        budget = pr.parse_budget(self.teacher, params=f"{share}x")

        def searched() -> dict[str, Any]:
            found = pr.search(self.teacher, scores, budget, calibration=self.calibration, heldout=self.validation)
            return dict(found.best.architecture)

        shape = self.teacher.architecture.replace(**kept(self.rows / f"{share}" / "shape.json", searched))
        parameters = budget.parameters(shape)
        return Bench(self.teacher, self.calibration, self.validation, parameters, shape, statistics)

    def _statistics(self) -> pr.Statistics:
        file = self.folder / "statistics.safetensors"
        if not file.exists():
            save_statistics(pr.measure(self.teacher, self.scoring), file)
        return load_statistics(file)


def prunus(bench: Bench) -> PreTrainedModel:
    """What `prunus prune` makes of the shape."""
    student = cut(bench.teacher, pr.score(bench.statistics), bench.shape)
    return repaired(bench.teacher, student, bench.calibration)


def random_init(bench: Bench) -> PreTrainedModel:
    torch.manual_seed(0)
    return from_config(cut(bench.teacher, pr.score(bench.statistics), bench.shape).config, torch.float32)


def compared(model: PreTrainedModel, teacher: Cache, blocks: Blocks) -> dict[str, float]:
    """Perplexity, and divergence from the teacher's cached states: it need not run again for every model."""
    nll = kl = counted = 0.0
    with torch.inference_mode():
        for start in range(0, len(blocks), MICRO_BLOCKS):
            indices = range(start, min(start + MICRO_BLOCKS, len(blocks)))
            tokens_BS, _ = batch = [part.to(model.device) for part in blocks.batch(indices)]
            valid_N = targets(*batch).flatten()
            theirs, hidden_NH = teacher.targets(indices, *batch), Live(model)(*batch).flatten(0, 1)
            follows_N = tokens_BS.roll(-1, dims=1).flatten()
            for at_R in valid_N.nonzero().flatten().split(ROWS_OF_LOGITS):
                log_p_RV = head_of(model).logits(hidden_NH[at_R]).log_softmax(-1)
                log_q_RV = theirs.head.logits(theirs.hidden_NE[at_R]).log_softmax(-1)
                nll -= log_p_RV.gather(1, follows_N[at_R, None]).sum(dtype=torch.float64).item()
                kl += torch.linalg.vecdot(log_q_RV.exp(), log_q_RV - log_p_RV).sum(dtype=torch.float64).item()
                counted += len(at_R)
    return {"perplexity": torch.tensor(nll / counted).exp().item(), "kl": kl / counted}


ROWS: Mapping[str, Callable[[Bench], PreTrainedModel]] = {**METHODS, OURS: prunus, RANDOM_INIT: random_init}


def trained(model: PreTrainedModel, teacher: Cache, blocks: Blocks, rate: float | None) -> PreTrainedModel:
    """`prunus.distill` of a copy of a model in memory, which need not be one that a checkpoint can hold."""
    model, settings = copy.deepcopy(model), Settings(tokens=blocks.num_tokens, learning_rate=rate)
    size = size_of([matrix] for matrix in anatomy.layers_of(model).parameters() if matrix.ndim > 1)
    shape = {"num_blocks": len(blocks), "block_size": blocks.block_size, "hidden": model.config.hidden_size}
    schedule = plan(settings, **shape, size=size)
    losses = Losses(model, teacher, blocks, settings, None, MICRO_BLOCKS)
    masters, curve = Masters(losses, hardware.compute_dtype(), weight_decay=settings.weight_decay), []
    masters.publish()
    for step in range(schedule.steps):
        curve.append(accumulate(losses, masters, curve, schedule))
        masters.clip(settings.clip)
        masters.step(learning_rate(step, schedule, settings, [point["loss"] for point in curve]))
        masters.forget_gradients()
    return model.eval()


def row(laboratory: Laboratory, method: str, bench: Bench, scored: Mapping[str, LocalTask], limit: int | None) -> dict:
    """One method at one size: made, measured, trained at each rate, measured. The best rate is the one that counts."""
    started = time.monotonic()
    model = ROWS[method](bench).float().requires_grad_(True)
    result = {"method": method, "parameters": count(model), "seconds": time.monotonic() - started}
    result |= conditions() | {"tokens": laboratory.train.num_tokens}
    teacher = laboratory.cache("train", laboratory.train)
    students = [trained(model, teacher, laboratory.train, rate) for rate in laboratory.rates]
    before, after = laboratory.judged(model), [laboratory.judged(student) for student in students]
    best = min(range(len(students)), key=lambda number: mean_kl(after[number]))
    result |= {"before": before, "after": after[best], "rate": laboratory.rates[best]}
    result["tasks"] = accuracies(students[best], laboratory, scored, limit)
    return result


def teacher_row(laboratory: Laboratory, scored: Mapping[str, LocalTask], limit: int | None) -> dict:
    model = laboratory.teacher.module(hardware.compute_dtype(), hardware.device())
    found = accuracies(model, laboratory, scored, limit)
    return {"method": "teacher", "parameters": count(model), "before": laboratory.judged(model), "tasks": found}


def accuracies(
    model: PreTrainedModel, laboratory: Laboratory, scored: Mapping[str, LocalTask], limit: int | None
) -> dict:
    """Of each task [accuracy, its standard error]."""
    if not scored:
        return {}
    found = run_tasks(model, laboratory.teacher.tokenizer(), list(scored.values()), limit=limit)
    return {name: [found[task.name][key] for key in ("acc", "acc_stderr")] for name, task in scored.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", action="append", required=True)
    parser.add_argument("--shares", default="0.8,0.67,0.5")
    parser.add_argument("--tokens", type=parse_quantity, default=100_000)
    parser.add_argument("--rates", help="learning rates to choose from; default: Prunus's own")
    parser.add_argument("--only", help="methods, separated by semicolons")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    hardware.keep_freed_memory()
    laboratory = Laboratory(options)
    scored = tasks(options.tasks) if options.tasks else {}
    teacher = laboratory.rows / "teacher.json"
    if not teacher.exists() or (scored and not json.loads(teacher.read_text())["tasks"]):
        write(teacher, teacher_row(laboratory, scored, options.limit))
    for share in options.shares.split(","):
        bench = laboratory.bench(float(share))
        print(f"\n{share} of the parameters: {bench.parameters:,}; Prunus found {bench.shape}", flush=True)
        for method in options.only.split(";") if options.only else ROWS:
            file = laboratory.rows / share / f"row-{method.replace(' ', '-')}.json"
            missing = method in PACKAGES and importlib.util.find_spec(PACKAGES[method]) is None
            if missing or file.exists():
                continue
            try:
                write(file, row(laboratory, method, bench, scored, options.limit))
                print(f"{method}: done", flush=True)
            except Inapplicable as why:
                print(f"{method}: left out, {why}", flush=True)
        print(table(laboratory.rows / share, json.loads(teacher.read_text())), flush=True)


if __name__ == "__main__":
    main()
