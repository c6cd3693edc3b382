"""A run directory: one recipe, the stages' files in order, and who may write to it.

    0-text/  1-statistics.safetensors  1-scores.safetensors  2-candidates.json  3-pruned/  4-distilled/
    5-evaluation.json  5-report.json  report.html  recipe.yaml  run.json

A file that is there is finished, because every one is written beside and renamed. So a run that was killed goes on with
the first stage whose file is missing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunus import console
from prunus import recipe as recipes
from prunus.budget import LIMITS, parse_budget
from prunus.checkpoint import Checkpoint, load, verify_weights
from prunus.distill import training_state
from prunus.errors import BadOutput, PrunusError
from prunus.files import atomic_file
from prunus.measure import Statistics, load_statistics
from prunus.recipe import STAGES, Recipe
from prunus.scores import Scores, load_scores
from prunus.text import Blocks, load_blocks, order

TEXT = "0-text"
OUTPUTS = {
    "text": (f"{TEXT}/train", f"{TEXT}/heldout"),
    "measure": ("1-statistics.safetensors",),
    "score": ("1-scores.safetensors",),
    "search": ("2-candidates.json",),
    "prune": ("3-pruned",),
    "distill": ("4-distilled",),
    "evaluate": ("5-evaluation.json",),
    "report": ("5-report.json", "report.html"),
}
LARGER = "0-larger"
"""The run of the larger student that this one is cut out of, where a cut of more than a third goes in rounds."""
LARGEST_CUT = 1 / 3
"""Share of the parameters that one cut takes at most; more goes in rounds (Minitron, arXiv:2407.14679)."""
ROUNDING = 0.01
"""Of a number of rounds: 0.9x to 0.4x is two cuts of a third, though the parameters miss that by a few."""
BASELINE = "4-baseline"
TEACHER_CACHE = "4-teacher-cache"
TOURNAMENT = ".tournament"
DEPENDS_ON = {
    "text": ("model", "data", "distill.tokens", "measure.tokens", "prune.tokens"),
    "measure": ("start", "uneven", "measure", "distill.seed"),
    "score": ("score",),
    "search": (*LIMITS, "context", "arch", "search"),
    "prune": ("prune",),
    "distill": ("distill",),
    "evaluate": ("evaluate",),
    "report": (),
}
"""Recipe keys that each stage is the first to depend on."""
WITHOUT_EFFECT = {"distill": {"checkpoint_seconds", "gradient_checkpointing", "trackers"}, "search": {"workers"}}
"""Keys inside those that change no result."""


@dataclass
class Run:
    """An open run directory. Values are read from the stages' files when they are first asked for."""

    root: Path
    recipe: Recipe

    def path(self, stage: str) -> Path:
        return self.root / OUTPUTS[stage][-1]

    def finished(self, stage: str) -> bool:
        baseline = stage == "distill" and self.recipe.baseline
        names = (*OUTPUTS[stage], BASELINE) if baseline else OUTPUTS[stage]
        return all((self.root / name).exists() for name in names)

    @functools.cached_property
    def teacher(self) -> Checkpoint:
        """The opened teacher, its weights checked, and the same as when the run began."""
        teacher = load(self.recipe.model, uneven=self.recipe.uneven)
        verify_weights(teacher)
        return teacher

    @functools.cached_property
    def parent(self) -> Checkpoint:
        """What is cut: the teacher, or an earlier student of it."""
        return self.first if self.larger is None else load(self.root / LARGER / OUTPUTS["distill"][-1])

    @functools.cached_property
    def first(self) -> Checkpoint:
        """What the first round cuts."""
        if self.recipe.start is None:
            return self.teacher
        student = load(self.recipe.start)
        verify_weights(student)
        return student

    @functools.cached_property
    def rounds(self) -> int:
        """Cuts, with training between, that lead to the parameters asked for."""
        return self._rounds[0]

    @functools.cached_property
    def _rounds(self) -> tuple[int, int]:
        """Their number, and the parameters at the end of the last but one."""
        if not self.recipe.rounds or self.recipe.params is None:
            return 1, 0
        (limit,) = parse_budget(self.first, whole=self.teacher, params=self.recipe.params).limits
        share = limit.target / self.first.parameters
        count = max(1, math.ceil(math.log(share) / math.log(1 - LARGEST_CUT) - ROUNDING))
        return count, round(limit.target / share ** (1 / count))

    @property
    def larger(self) -> Recipe | None:
        """The recipe of the round before the last: a run of its own that ends with its training."""
        count, parameters = self._rounds
        if count == 1:
            return None
        values = {key: value for key, value in self.recipe.model_dump(mode="json").items() if key not in LIMITS}
        tokens = (self.recipe.distill.tokens or self.train.num_tokens) * (count - 1) // count
        changes = {
            "params": str(parameters),
            "to": str(self.root / LARGER),
            "distill.tokens": tokens,
            "distill.seed": self.recipe.distill.seed + 1,
            "baseline": False,
            "stop_after": "distill",
        }
        return recipes.parse(recipes.override(values, changes), source=str(self.root))

    @functools.cached_property
    def train(self) -> Blocks:
        return load_blocks(self.root / TEXT / "train")

    @functools.cached_property
    def calibration(self) -> Blocks:
        """What the teacher is measured on."""
        return self._reached_last(self.recipe.measure.tokens)

    @functools.cached_property
    def repair_text(self) -> Blocks:
        """What the student is refitted on; it learns that half by heart, so a training step on it teaches less."""
        return self._reached_last(self.recipe.prune.tokens)

    def _reached_last(self, tokens: int) -> Blocks:
        """A random part of the training text: what training reaches last."""
        count = min(len(self.train), max(1, tokens // self.recipe.data.block_size))
        in_turn = order(len(self.train), seed=self.recipe.distill.seed, epoch=0)
        return self.train.select(in_turn[len(in_turn) - count :].tolist())

    @functools.cached_property
    def _heldout(self) -> Blocks:
        return load_blocks(self.root / TEXT / "heldout")

    @functools.cached_property
    def validation(self) -> Blocks:
        """Held-out text that decides between candidates: a third, so that the rest judges the winner untouched."""
        return self._heldout.head(max(1, len(self._heldout) // 3))

    @functools.cached_property
    def test(self) -> Blocks:
        return self._heldout.select(range(len(self.validation), len(self._heldout)))

    @functools.cached_property
    def statistics(self) -> Statistics:
        return load_statistics(self.path("measure"))

    @functools.cached_property
    def scores(self) -> Scores:
        return load_scores(self.path("score"))

    @functools.cached_property
    def candidates(self) -> dict[str, Any]:
        return read_json(self.path("search"))

    @functools.cached_property
    def pruned(self) -> Checkpoint:
        return load(self.path("prune"))

    @functools.cached_property
    def distilled(self) -> Checkpoint:
        return load(self.path("distill"))

    @functools.cached_property
    def baseline(self) -> Checkpoint | None:
        return load(self.root / BASELINE) if (self.root / BASELINE).is_dir() else None

    @property
    def log(self) -> dict[str, Any]:
        """run.json: what ran when, and on which teacher."""
        file = self.root / "run.json"
        return read_json(file) if file.is_file() else {"stages": {}}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Runs a stage and notes its time in run.json. Time that a killed attempt took is not known."""
        start = time.monotonic()
        with console.stage(stage):
            yield
        entry = {"seconds": round(time.monotonic() - start, 2), "finished": datetime.now(UTC).isoformat("T", "seconds")}
        log = self.log
        write_json(self.root / "run.json", log | {"stages": log["stages"] | {stage: entry}})

    def require_space(self, num_bytes: float, what: str) -> None:
        """Raises BadOutput if the disk cannot take what is about to be written."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise BadOutput(
                f"{self.root}: {what} needs {num_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free. "
                "Free some space and run the same command again; finished stages are kept."
            )


def write_json(file: Path, value: object) -> None:
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise BadOutput(f"{file}: damaged ({error}); delete it and run the same command again") from error


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def open_run(recipe: Recipe) -> Run:
    """The run of a recipe; nothing is written yet.

    Raises:
        BadOutput: its directory holds other files, or results of another teacher.
        BadCheckpoint, UnsupportedModel: see `checkpoint.load`.
    """
    run = Run(check_folder(Path(recipe.to)), recipe)
    if run.log.get("teacher") not in (None, run.teacher.fingerprint):
        raise BadOutput(f"{run.root} was made with other weights of {recipe.model}; give a new folder with --to")
    return run


def check_folder(root: Path) -> Path:
    """A folder for runs, which need not be there yet. Raises BadOutput if it holds what Prunus did not write."""
    if root.exists() and not root.is_dir():
        raise BadOutput(f"{root} is a file; give a folder")
    visible = [path.name for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    if visible and not is_run(root):
        raise BadOutput(
            f"{root} holds files that Prunus did not write ({', '.join(sorted(visible)[:3])}). "
            "Give a new folder with --to."
        )
    return root


def write_recipe(recipe: Recipe, root: Path) -> None:
    with atomic_file(root / "recipe.yaml") as partial:
        partial.write_text(recipes.to_yaml(recipe))


@contextlib.contextmanager
def claim(run: Run, *, redo: bool = False, redo_stage: str | None = None) -> Iterator[None]:
    """Make the directory of a run, or take up an earlier run, for this process alone.

    Args:
        redo: where the recipe differs from the one that the directory was made with, do the stages that depend on the
            difference again.
        redo_stage: do this stage and the later ones again in any case.
    Raises:
        BadOutput: the directory holds another recipe's results, or is in use.
    """
    root, existed, created = run.root, run.root.is_dir(), not is_run(run.root)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            if not created:
                _reconcile(run, redo, redo_stage)
            _remove_leftovers(root)
            write_recipe(run.recipe, root)
            write_json(root / "run.json", run.log | {"teacher": run.teacher.fingerprint})
            yield
    except Timeout as error:
        raise BadOutput(f"{root} is in use by another prunus process; wait for it, or give another folder") from error
    except (PrunusError, OSError):
        if created and not any(run.finished(stage) for stage in STAGES):
            shutil.rmtree(root)  # nothing was achieved: leave the disk as it was found
            root.mkdir() if existed else None
        raise


def _reconcile(run: Run, redo: bool, redo_stage: str | None) -> None:
    """Remove what the changed recipe makes stale, if the user allows it."""
    old = recipes.parse(recipes.read_yaml(run.root / "recipe.yaml"), source=str(run.root / "recipe.yaml"))
    changed = {stage: keys for stage in STAGES if (keys := _changed_keys(stage, old, run.recipe))}
    if _other_rounds(run, old):
        changed["measure"] = [*changed.get("measure", []), "rounds"]
    stale_from = min((STAGES.index(stage) for stage in changed), default=len(STAGES))
    stale = [stage for stage in STAGES[stale_from:] if any(_begun(run.root / name) for name in OUTPUTS[stage])]
    if stale and not redo:
        names = ", ".join(key for keys in changed.values() for key in keys)
        raise BadOutput(
            f"{run.root} was made with another recipe (changed: {names}), "
            f"which its stages {', '.join(stale)} depend on. "
            "Give a new folder with --to, or --redo to do those stages again."
        )
    # A stage that was killed is not done again but gone on with.
    again = redo_stage is not None and run.finished(redo_stage)
    first = min(stale_from, STAGES.index(redo_stage) if redo_stage and again else len(STAGES))
    for stage in STAGES[first:]:
        _remove(run.root, (*OUTPUTS[stage], *((BASELINE,) if stage == "distill" else ())))
    if run.recipe.baseline and not (run.root / BASELINE).exists():
        _remove(run.root, (*OUTPUTS["evaluate"], *OUTPUTS["report"]))  # they lack the baseline, which is wanted now


def _other_rounds(run: Run, old: Recipe) -> bool:
    """Whether another recipe cuts something else in its last round."""
    same = all(getattr(old, key) == getattr(run.recipe, key) for key in ("start", "params", "rounds"))
    return not same and Run(run.root, old)._rounds != run._rounds


def _begun(output: Path) -> bool:
    return output.exists() or training_state(output).exists()


def _changed_keys(stage: str, old: Recipe, new: Recipe) -> list[str]:
    before, after = (recipe.model_dump(exclude=WITHOUT_EFFECT) for recipe in (old, new))
    return [key for key in DEPENDS_ON[stage] if _value(before, key) != _value(after, key)]


def _value(recipe: dict[str, Any], key: str) -> object:
    return functools.reduce(lambda section, part: section[part], key.split("."), recipe)


def _remove(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True) if path.is_file() else None
        shutil.rmtree(training_state(path), ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """What a killed process left behind and no stage will take up."""
    for file in root.glob(".*.partial"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for name in (*OUTPUTS["distill"], BASELINE):
        if (root / name).exists():
            shutil.rmtree(training_state(root / name), ignore_errors=True)
