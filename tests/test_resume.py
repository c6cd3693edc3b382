"""A run that is killed at any moment and started again ends with the same bits as an undisturbed one."""

import json
import random
import re
from pathlib import Path

import pytest
from conftest import small_flags
from killing import current_stage, finish, kill_inside, start

from prunus import pipeline
from prunus.recipe import STAGES
from prunus.run import Run

FLAGS = ["--set", "distill.checkpoint_seconds=0"]
LONGER = ["--set", "distill.tokens=4096"]
STUDENT = "4-distilled/model.safetensors"


def command(model: Path, corpus: Path, to: Path) -> list[str]:
    return ["compress", str(model), *small_flags(corpus, to), *FLAGS]


@pytest.fixture(scope="module")
def undisturbed(whole_model, corpus, tmp_path_factory) -> tuple[Path, str, str]:
    """An undisturbed run in a process of its own: its folder, stdout and stderr."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    return root, *finish(*command(whole_model, corpus, root), *LONGER)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(whole_model, corpus, undisturbed, tmp_path):
    moments, root = random.Random(0), tmp_path / "run"
    run = [*command(whole_model, corpus, root), *LONGER]
    early = moments.choice(STAGES[: STAGES.index("distill")])
    seconds = json.loads((undisturbed[0] / "run.json").read_text())["stages"]
    for stage in (early, "distill"):
        delay = moments.uniform(0, 0.6) * seconds[stage]["seconds"]
        assert kill_inside(start(*run), root, stage, delay) is not None
    assert current_stage(root) == "distill"
    assert list(root.glob(".4-distilled.training/*/state.json"))
    finish(*run)
    assert (root / STUDENT).read_bytes() == (undisturbed[0] / STUDENT).read_bytes()
    assert files(root) == files(undisturbed[0])
    stages = {stage["name"]: stage["seconds"] for stage in json.loads((root / "5-report.json").read_text())["stages"]}
    assert stages["distill"] >= json.loads((root / "4-distilled/training.json").read_text())["seconds"]


def files(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*")}


@pytest.mark.slow
def test_nothing_but_the_stages_is_said_on_stderr(undisturbed):
    """No bar and no warning of transformers, datasets or tqdm; a terminal gets our own bars instead."""
    _, stdout, stderr = undisturbed
    lines = stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(STAGES)
    assert all(re.fullmatch(r"\w+: [\d.]+ s", line) for line in lines)
    assert "Distilled" in stdout


def test_ctrl_c_is_not_a_traceback(invoke, whole_model, corpus, tmp_path, monkeypatch):
    def interrupted(_: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(pipeline.RUN_STAGE, "measure", interrupted)
        result = invoke(*command(whole_model, corpus, tmp_path / "run"))
    assert result.exit_code == 130
    assert result.stderr.strip().endswith("Stopped. Run the same command again to go on.")
    assert (tmp_path / "run" / "0-text" / "train").is_dir()
    assert invoke(*command(whole_model, corpus, tmp_path / "run"), "--stop-after", "score").exit_code == 0


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(invoke, whole_model, corpus, tmp_path):
    straight, root = tmp_path / "straight", tmp_path / "run"
    assert invoke(*command(whole_model, corpus, straight), "--stop-after", "distill").exit_code == 0
    assert invoke(*command(whole_model, corpus, root), "--stop-after", "prune").exit_code == 0
    assert current_stage(root) == "distill"
    before = (root / "3-pruned" / "model.safetensors").stat().st_mtime_ns
    assert invoke("compress", str(root)).exit_code == 0
    assert current_stage(root) is None
    assert (root / "3-pruned" / "model.safetensors").stat().st_mtime_ns == before
    assert (root / STUDENT).read_bytes() == (straight / STUDENT).read_bytes()


def test_checkpoints_can_be_taken_at_another_pace(invoke, whole_model, corpus, tmp_path):
    """The key changes no result, so it makes no stage stale."""
    run = command(whole_model, corpus, tmp_path / "run")
    assert invoke(*run, "--stop-after", "distill").exit_code == 0
    before = (tmp_path / "run" / STUDENT).stat().st_mtime_ns
    assert invoke(*run, "--stop-after", "distill", "--set", "distill.checkpoint_seconds=60").exit_code == 0
    assert (tmp_path / "run" / STUDENT).stat().st_mtime_ns == before


def test_an_unfinished_distillation_is_not_thrown_away(invoke, whole_model, corpus, tmp_path, monkeypatch):
    """Neither by `prunus distill RUN`, which goes on with it, nor by another setting without --redo."""
    root = tmp_path / "run"
    run = command(whole_model, corpus, root)
    assert invoke(*run, "--stop-after", "prune").exit_code == 0
    stop_after_steps(monkeypatch, 5)
    assert invoke("distill", str(root)).exit_code == 130
    state = root / ".4-distilled.training"
    kept = contents(state)
    changed = invoke(*run, "--set", "distill.clip=2.0")
    assert changed.exit_code == 2
    assert "(changed: distill)" in changed.stderr
    assert contents(state) == kept
    steps = stop_after_steps(monkeypatch, 10**6)
    assert invoke("distill", str(root)).exit_code == 0
    assert steps[0] == 6
    assert not state.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after_steps(monkeypatch, count: int) -> list[int]:
    """Make Ctrl-C come after so many steps of distillation; returns the list of steps, filled as they are made."""
    steps: list[int] = []

    def note(_: object, __: object, at: object) -> None:
        steps.append(at.step)
        if len(steps) > count:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_show_step", note)
    return steps


@pytest.mark.slow
def test_leftovers_of_a_killed_process_are_removed(invoke, whole_model, corpus, tmp_path):
    root = tmp_path / "run"
    run = command(whole_model, corpus, root)
    assert invoke(*run, "--stop-after", "distill").exit_code == 0
    whole = files(root)
    (root / ".4-distilled.training" / "7").mkdir(parents=True)  # all, but the process was killed before it was removed
    (root / ".4-distilled.training" / ".partial").mkdir()
    (root / ".5-report.json.partial").write_bytes(b"half")
    (root / ".4-baseline.partial").mkdir()
    assert invoke(*run, "--stop-after", "distill").exit_code == 0
    assert files(root) == whole
