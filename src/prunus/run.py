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
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunus import console
from prunus import recipe as recipes
from prunus.checkpoint import Checkpoint, load, verify_weights
from prunus.errors import BadOutput
from prunus.files import atomic_file
from prunus.measure import Statistics, load_statistics
from prunus.recipe import Recipe
from prunus.rounds import Rounds, recipe_of_larger, rounds
from prunus.scores import Scores, load_scores
from prunus.shared_tokens import check_same_tokens
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
BASELINE = "4-baseline"
TEACHER_CACHE = "4-teacher-cache"
TOURNAMENT = ".tournament"
RATES = "rates.json"
"""In its folder: what was timed for a limit of latency."""
ASIDE = ".aside"
"""What a changed recipe made stale, until a stage is done again; and the recipe that it was made with."""


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

    @property
    def recipe_before(self) -> dict[str, Any]:
        """What the directory was made with; nothing of a new one."""
        file = self.root / "recipe.yaml"
        return recipes.read_yaml(file) if file.is_file() else {}

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
        student = load(self.recipe.start, uneven=self.recipe.uneven)
        verify_weights(student)
        check_same_tokens(student, self.teacher)
        return student

    @functools.cached_property
    def rounds(self) -> Rounds:
        """Cuts, with training between, that lead to the parameters asked for."""
        return rounds(self.recipe, self.first, self.teacher)

    @property
    def larger(self) -> Recipe | None:
        """The recipe of the round before the last."""
        tokens = self.recipe.distill.tokens or (self.train.num_tokens if self.rounds.count > 1 else 0)
        return recipe_of_larger(self.recipe, self.rounds, tokens=tokens, to=self.root / LARGER)

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
    def models(self) -> dict[str, str]:
        """Fingerprints of the teacher and of what the first round cuts."""
        return {"teacher": self.teacher.fingerprint, "start": self.first.fingerprint}

    @property
    def log(self) -> dict[str, Any]:
        """run.json: what ran when, and on which models."""
        file = self.root / "run.json"
        return read_json(file) if file.is_file() else {"stages": {}}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Runs a stage and notes its time in run.json. Time that a killed attempt took is not known."""
        start = time.monotonic()
        with console.stage(stage):
            yield
        self.settle()
        entry = {"seconds": round(time.monotonic() - start, 2), "finished": datetime.now(UTC).isoformat("T", "seconds")}
        log = self.log
        write_json(self.root / "run.json", log | {"stages": log["stages"] | {stage: entry}})

    def settle(self) -> None:
        """What a changed recipe made stale goes for good: something newer is there."""
        discard(self.root / ASIDE)

    def require_space(self, num_bytes: float, what: str) -> None:
        """Raises BadOutput if the disk cannot take what is about to be written."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise BadOutput(
                f"{self.root}: {what} needs {num_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free. "
                "Free some space and run the same command again; finished stages are kept."
            )


def discard(folder: Path) -> None:
    """Remove it as a whole: what a kill leaves of it is not taken for the folder, and goes with other leftovers."""
    doomed = folder.with_name(f"{folder.name}.partial")
    if folder.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


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
