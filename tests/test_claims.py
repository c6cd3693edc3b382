"""What a changed recipe made stale: it comes back until something new is there, wherever a process breaks off."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_pipeline import make_recipe

from prunus import pipeline, run
from prunus.checkpoint import load
from prunus.pipeline import compress
from prunus.recipe import read_yaml
from prunus.run import ASIDE, LARGER

RATE = SMALL["distill"] | {"learning_rate": 0.01}


def results(root: Path) -> dict[str, bytes | None]:
    """Every file and folder but the lock, what tells times, and the page made of that."""
    timed = (".lock", "run.json", "5-report.json", "report.html", "README.md", "training.json")
    paths = (path for path in root.rglob("*") if path.name not in timed)
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(paths)}


@pytest.fixture(scope="module")
def finished(whole_model, corpus, tmp_path_factory):
    """Name → a run that came to its end: as it was, with another rate, in rounds, and in rounds with another rate."""
    folder = tmp_path_factory.mktemp("finished")
    ways = {"one": {}, "other": {"distill": RATE}, "rounds": {"params": "0.5x"}}
    ways["other_rounds"] = ways["rounds"] | ways["other"]
    for name, changes in ways.items():
        compress(make_recipe(whole_model, corpus, folder / "run", **changes))
        (folder / "run").rename(folder / name)
    return folder


@pytest.fixture
def made(finished, whole_model, corpus, tmp_path):
    """A copy of a finished run, in the place that it says it was made in; and a recipe for that place."""
    root = finished / "run"

    def copied(name: str) -> Path:
        shutil.rmtree(root, ignore_errors=True)
        return shutil.copytree(finished / name, root)

    yield copied, lambda **changes: make_recipe(whole_model, corpus, root, **changes)
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("stage", ["text", "search"])
def test_a_kill_while_results_are_set_aside_takes_none_away(made, finished, corpus, tmp_path, monkeypatch, stage):
    copied, recipe = made
    root = copied("one")
    changes = {
        "text": {"data": SMALL["data"] | {"train": str(corpus), "heldout_tokens": 512}},
        "search": {"params": "0.8x"},
    }
    moved, there, replace = [], [], Path.replace

    def photograph(path, target):
        if ASIDE in (path.parent.name, path.parent.parent.name, target.parent.name, target.parent.parent.name):
            moved.append(shutil.copytree(root, tmp_path / str(len(moved))))
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", photograph)
        patched.setitem(pipeline.RUN_STAGE, stage, lambda _: interrupt(there.append(len(moved))))
        with pytest.raises(KeyboardInterrupt):
            compress(recipe(**changes[stage]), redo=True)
    assert results(root) == results(finished / "one")
    assert 5 < there[0] < len(moved)
    for photo in moved:  # there and, after the interrupt, back again
        shutil.rmtree(root)
        photo.rename(root)
        compress(recipe())
        assert results(root) == results(finished / "one")


def test_a_kill_while_stale_results_are_thrown_away_brings_none_back(made, finished, tmp_path, monkeypatch):
    copied, recipe = made
    root = copied("one")
    left, rmtree = [], shutil.rmtree

    def partly(path, *args, **options):
        if Path(path).name.startswith(".aside") and (Path(path) / "4-distilled").exists():
            (Path(path) / "recipe.yaml").unlink()
            (Path(path) / "4-distilled" / "model.safetensors").unlink()
            left.append(shutil.copytree(root, tmp_path / "left"))
        rmtree(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run.shutil, "rmtree", partly)
        compress(recipe(distill=RATE), redo=True)
    (photo,) = left
    shutil.rmtree(root)
    photo.rename(root)
    compress(recipe(distill=RATE))
    assert results(root) == results(finished / "other")


def test_a_finished_student_stays_though_its_baseline_breaks_off(made, finished, monkeypatch):
    copied, recipe = made
    root = copied("one")
    distill = pipeline.distill

    def broken(*args, random_init, **options):
        if random_init:
            raise KeyboardInterrupt
        return distill(*args, random_init=random_init, **options)

    monkeypatch.setattr(pipeline, "distill", broken)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(distill=RATE, baseline=True), redo=True)
    weights = "4-distilled/model.safetensors"
    assert (root / weights).read_bytes() == (finished / "other" / weights).read_bytes()
    assert read_yaml(root / "recipe.yaml")["distill"]["learning_rate"] == 0.01


@pytest.mark.parametrize("change", [{"rounds": False}, {"distill": RATE}], ids=["one round", "another rate"])
def test_an_interrupt_before_anything_was_trained_leaves_a_run_in_rounds(made, finished, monkeypatch, change):
    copied, recipe = made
    root = copied("rounds")
    monkeypatch.setattr(pipeline, "prune", interrupt)
    monkeypatch.setattr(pipeline, "distill", interrupt)
    monkeypatch.setitem(pipeline.RUN_STAGE, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(params="0.5x", **change), redo=True)
    monkeypatch.undo()
    assert results(root) == results(finished / "rounds")
    assert load(root / LARGER / "4-distilled").parameters


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_larger_student_begun_anew_is_gone_on_with(made, finished, monkeypatch):
    """And not what came before it: half of that is gone."""
    copied, recipe = made
    root = copied("rounds")
    again = recipe(params="0.5x", distill=RATE | {"checkpoint_seconds": 0})
    steps: list[int] = []

    def note(_: object, __: object, at: object) -> None:
        steps.append(at.step)
        if len(steps) > 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_show_step", note)
        with pytest.raises(KeyboardInterrupt):
            compress(again, redo=True)
    assert read_yaml(root / "recipe.yaml")["distill"]["learning_rate"] == 0.01
    student, fresh = compress(again).distilled, load(finished / "other_rounds" / "4-distilled")
    assert all(torch.equal(student.tensor(name), fresh.tensor(name)) for name in fresh.stored)
