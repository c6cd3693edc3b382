"""Who may write to a run directory, and which of its results a changed recipe makes stale."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunus import recipe as recipes
from prunus.budget import LIMITS
from prunus.distill import training_state
from prunus.errors import BadOutput, PrunusError
from prunus.files import atomic_file
from prunus.recipe import STAGES, Recipe
from prunus.run import (
    ASIDE,
    BASELINE,
    LARGER,
    OUTPUTS,
    TOURNAMENT,
    Run,
    discard,
    is_run,
    read_json,
    write_json,
    write_recipe,
)

CUT_BY = ("prune.repair", "prune.norm_correction", "prune.head_residuals", "prune.damping")
DEPENDS_ON = {
    "text": ("model", "data", "distill.tokens", "measure.tokens", "prune.tokens"),
    "measure": ("start", "uneven", "measure", "distill.seed"),
    "score": ("score",),
    "search": (*LIMITS, "context", "arch", "search", *CUT_BY),
    "prune": ("prune",),
    "distill": ("distill",),
    "evaluate": ("evaluate",),
    "report": (),
}
"""Recipe keys that each stage depends on, beside those of the stages before it."""
BESIDE = {"text": (LARGER,), "search": (TOURNAMENT,), "distill": (BASELINE,)}
"""What else goes when a stage is done again."""
RECORDS = ("recipe.yaml", "run.json")
"""What says how the results of a run were made."""
NOTES = "aside.json"
"""In the folder of what was set aside: what that is, what there was of it, and the recipe of the larger student."""
WITHOUT_EFFECT = {"distill": {"checkpoint_seconds", "gradient_checkpointing", "trackers"}, "search": {"workers"}}
"""Keys inside those that change no result."""


def _with_states(outputs: Iterable[str]) -> list[Path]:
    """Each with the state of its training, if it has one; relative to the run."""
    return [path for name in outputs for path in (Path(name), training_state(Path(name)))]


LONG = (Path(TOURNAMENT), *_with_states((*OUTPUTS["distill"], BASELINE)))
"""What takes long to make: who has begun it anew wants it more than what was there before."""


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
    root, created = run.root, not is_run(run.root)
    found = set(root.iterdir()) if root.is_dir() else None
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            _put_back_of_killed(root)
            stale = [] if created else _stale(run, redo, redo_stage)
            _remove_leftovers(root)
            with _set_aside(root, stale):
                write_recipe(run.recipe, root)
                write_json(root / "run.json", run.log | run.models)
                yield
                run.settle()
    except Timeout as error:
        raise BadOutput(f"{root} is in use by another prunus process; wait for it, or give another folder") from error
    except (PrunusError, OSError):
        if created and not any(run.finished(stage) for stage in STAGES):
            _leave(root, found)  # nothing was achieved
        raise


@contextlib.contextmanager
def claim_family(recipe: Recipe, largest: Recipe) -> Iterator[None]:
    """Make the directory of several sizes, or take up an earlier one: only its recipe, the sizes are claimed as runs.

    Raises:
        BadOutput: the directory is that of a single run.
    """
    root = Path(recipe.to)
    if (root / "run.json").is_file():
        raise BadOutput(f"{root} is a run of one size; give a new folder with --to")
    found, before = set(root.iterdir()) if root.is_dir() else None, root / "recipe.yaml"
    old = before.read_text(encoding="utf-8") if before.is_file() else None
    write_recipe(recipe, root)
    try:
        yield
    except (PrunusError, OSError):
        begun = Path(largest.to)
        if not (is_run(begun) and recipes.read_yaml(begun / "recipe.yaml") == largest.model_dump(mode="json")):
            _leave(root, found) if old is None else before.write_text(old, encoding="utf-8")
        raise


def _leave(root: Path, found: set[Path] | None) -> None:
    """The folder as it was found, with these files in it, or not there at all."""
    if found is None:
        shutil.rmtree(root)
        return
    for path in set(root.iterdir()) - found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _stale(run: Run, redo: bool, redo_stage: str | None) -> list[str]:
    """Outputs that the changed recipe makes stale, if the user allows it."""
    old = recipes.parse(run.recipe_before, source=str(run.root / "recipe.yaml"))
    if len(old.sizes) > 1:
        raise BadOutput(f"{run.root} holds runs of several sizes; give a new folder with --to, or name one of them")
    if _beside(old) == _beside(run.recipe):  # the run was moved, and with it what it starts from
        old = old.model_copy(update={"start": run.recipe.start, "to": run.recipe.to})
    if run.log.get("teacher") == run.teacher.fingerprint:  # or the teacher was
        old = old.model_copy(update={"model": run.recipe.model})
    changed = {stage: keys for stage in STAGES if (keys := _changed_keys(stage, old, run.recipe))}
    if other := _other_parent(run, old):
        changed["measure"] = [*changed.get("measure", []), other]
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
    outputs = [name for stage in STAGES[first:] for name in _outputs(stage)]
    if run.rounds.count == 1 and LARGER not in outputs:
        outputs.append(LARGER)  # of an earlier recipe
    trains = STAGES.index(run.recipe.stop_after) >= STAGES.index("distill")
    if run.recipe.baseline and trains and not (run.root / BASELINE).exists():
        outputs += [*OUTPUTS["evaluate"], *OUTPUTS["report"]]  # they lack the baseline, which is wanted now
    return outputs


def _other_parent(run: Run, old: Recipe) -> str | None:
    """Why the run cuts something else than it did with its old recipe, if it does."""
    if run.log.get("start", run.first.fingerprint) != run.first.fingerprint:
        return "the weights of start"
    before = Run(run.root, old)
    same = all(getattr(old, key) == getattr(run.recipe, key) for key in ("start", "params", "rounds"))
    if not same and before.rounds != run.rounds:
        return "rounds"
    if run.rounds.count == 1 or not run.finished("text"):
        return None
    trained, (then, now) = STAGES[: STAGES.index("distill") + 1], (before.larger, run.larger)
    stale = then and now and any(_changed_keys(stage, then, now) for stage in trained)
    return "the larger student" if stale else None


def _begun(output: Path) -> bool:
    return output.exists() or training_state(output).exists()


def _changed_keys(stage: str, old: Recipe, new: Recipe) -> list[str]:
    before, after = (recipe.model_dump(exclude=WITHOUT_EFFECT) for recipe in (old, new))
    keys = [*DEPENDS_ON[stage], *(["distill"] if stage == "search" and new.search.tokens else [])]
    return [key for key in keys if _value(before, key) != _value(after, key)]


def _beside(recipe: Recipe) -> str | None:
    """Where a run starts, as seen from its folder."""
    return recipe.start and os.path.relpath(recipe.start, recipe.to)


def _value(recipe: dict[str, Any], key: str) -> object:
    return functools.reduce(lambda section, part: section[part], key.split("."), recipe)


@contextlib.contextmanager
def _set_aside(root: Path, outputs: list[str]) -> Iterator[None]:
    """Inside, these are gone. Where an error comes before anything was done again, they and their recipe come back: a
    mistake in a changed recipe takes no results away."""
    try:
        _move_aside(root, _with_states(outputs))
        yield
    except BaseException:
        _put_back(root)
        raise


def _move_aside(root: Path, stale: list[Path]) -> None:
    """A kill may come between any two moves, so what was there is noted first."""
    aside, found = root / ASIDE, [str(path) for path in {*stale, *LONG} if (root / path).exists()]
    aside.mkdir(exist_ok=True)
    notes = {"stale": list(map(str, stale)), "found": found, "larger": _text_of(root / LARGER / "recipe.yaml")}
    write_json(aside / NOTES, notes)
    for record in RECORDS:
        if (root / record).exists():
            with atomic_file(aside / record) as partial:
                shutil.copy(root / record, partial)
    for path in stale:
        if (root / path).exists():
            _move(root / path, aside / path)


def _move(path: Path, to: Path) -> None:
    """At once: half of it in each place would be taken for the whole."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path.replace(to)


def _put_back(root: Path) -> None:
    """What was set aside, unless something that takes long was done again since, if only in part."""
    aside = root / ASIDE
    if (aside / NOTES).is_file():
        notes = read_json(aside / NOTES)

        def is_new(path: Path | str) -> bool:
            return (root / path).exists() and ((aside / path).exists() or str(path) not in notes["found"])

        if not any(map(is_new, LONG)) and not _begun_larger(root, notes["larger"]):
            for path in notes["stale"]:
                if is_new(path):
                    _remove(root / path)
                if (aside / path).exists():
                    _move(aside / path, root / path)
            for path in RECORDS:
                if (aside / path).exists():
                    _move(aside / path, root / path)
    discard(aside)


def _put_back_of_killed(root: Path) -> None:
    """The same for a process that was killed; a recipe that had made nothing stale stays."""
    if (root / LARGER).is_dir():
        _put_back_of_killed(root / LARGER)  # which its own process would have done first
    notes = root / ASIDE / NOTES
    if notes.is_file() and set(read_json(notes)["stale"]) & set(read_json(notes)["found"]):
        _put_back(root)
    discard(root / ASIDE)


def _begun_larger(root: Path, recipe_before: str | None) -> bool:
    """Whether the larger student is not, or will not be, what it was with this recipe."""
    larger = root / LARGER
    if (root / ASIDE / LARGER).exists() or _text_of(larger / "recipe.yaml") == recipe_before:
        return False
    return recipe_before is not None or any((larger / path).exists() for path in LONG)


def _text_of(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _outputs(stage: str) -> list[str]:
    return [*OUTPUTS[stage], *BESIDE.get(stage, ())]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove_leftovers(root: Path) -> None:
    """What a killed process left behind and no stage will take up."""
    for path in root.glob(".*.partial"):
        _remove(path)
    for name in (*OUTPUTS["distill"], BASELINE):
        if (root / name).exists():
            shutil.rmtree(training_state(root / name), ignore_errors=True)
