"""Cuts of more than a third in rounds, and several sizes in one run."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, small_flags
from test_pipeline import make_recipe

from prunus import pipeline, recipe
from prunus.checkpoint import load
from prunus.errors import BadOutput, BadRecipe, BudgetUnreachable, Stopped
from prunus.pipeline import compress
from prunus.recipe import STAGES
from prunus.rounds import Rounds
from prunus.run import LARGER, Run, is_run
from prunus.sizes import members


@pytest.mark.parametrize(
    ("params", "rounds"), [("0.9x", 1), ("0.67x", 1), ("0.66x", 2), ("0.45x", 2), ("0.4x", 3), ("0.4443x", 2)]
)
def test_no_round_takes_more_than_a_third(whole_model, corpus, tmp_path, params, rounds):
    run = Run(tmp_path, make_recipe(whole_model, corpus, tmp_path, params=params, distill={"tokens": 6000}))
    sizes, before = [run.teacher.parameters], run
    assert run.rounds.count == rounds
    parts = []
    while before.larger is not None:
        parts.append(before.larger)
        before = Run(tmp_path, before.larger)
    sizes += [int(part.params) for part in reversed(parts)]
    sizes.append(round(float(params[:-1]) * run.teacher.parameters))
    assert all(small >= 0.66 * large for large, small in itertools.pairwise(sizes))
    assert [part.distill.tokens for part in parts] == [6000 * n // rounds for n in range(rounds - 1, 0, -1)]
    assert Run(tmp_path, run.recipe.model_copy(update={"rounds": False})).rounds.count == 1


@pytest.fixture(scope="module")
def in_rounds(whole_model, corpus, tmp_path_factory) -> Run:
    settings = SMALL["distill"] | {"teacher_cache": "samples"}
    to = tmp_path_factory.mktemp("rounds") / "run"
    return compress(make_recipe(whole_model, corpus, to, params="0.5x", distill=settings))


def test_a_large_cut_leads_over_a_larger_student(in_rounds):
    larger, student = load(in_rounds.root / LARGER / "4-distilled"), load(in_rounds.root / "4-distilled")
    teacher = in_rounds.teacher
    assert larger.parameters == pytest.approx(2**-0.5 * teacher.parameters, rel=0.02)
    assert student.parameters == pytest.approx(0.5 * teacher.parameters, rel=0.02)
    assert in_rounds.parent.fingerprint == larger.fingerprint
    assert in_rounds.statistics.provenance["teacher"] == larger.fingerprint
    report = json.loads((in_rounds.root / "5-report.json").read_text())
    assert report["teacher"]["fingerprint"] == teacher.fingerprint
    assert report["parent"]["fingerprint"] == larger.fingerprint
    assert larger.fingerprint in (in_rounds.root / "report.html").read_text()


def test_the_time_of_the_larger_student_counts(in_rounds):
    stages = json.loads((in_rounds.root / "5-report.json").read_text())["stages"]
    seconds = {stage["name"]: stage["seconds"] for stage in stages}
    spent = json.loads((in_rounds.root / LARGER / "run.json").read_text())["stages"]
    assert list(seconds)[:3] == ["text", "larger student", "measure"]
    assert seconds["larger student"] == pytest.approx(sum(entry["seconds"] for entry in spent.values()))
    assert list(spent) == list(STAGES[1 : STAGES.index("distill") + 1]), "the text is shared"


def test_rounds_share_text_cache_and_tokens(in_rounds):
    larger = Run(in_rounds.root / LARGER, in_rounds.larger)
    assert larger.train.fingerprint == in_rounds.train.fingerprint
    file = "0-text/train/tokens.npy"
    assert (larger.root / file).samefile(in_rounds.root / file)
    tokens = [json.loads((run.root / "4-distilled/training.json").read_text())["tokens"] for run in (larger, in_rounds)]
    assert tokens[0] == tokens[1]
    manifests = [run.root / "4-teacher-cache/manifest.json" for run in (larger, in_rounds)]
    assert manifests[0].samefile(manifests[1])


def test_the_same_again_does_nothing_and_another_size_starts_anew(in_rounds):
    before = {file: file.stat().st_mtime_ns for file in in_rounds.root.rglob("*.safetensors")}
    compress(in_rounds.recipe)
    assert {file: file.stat().st_mtime_ns for file in in_rounds.root.rglob("*.safetensors")} == before
    other = in_rounds.recipe.model_copy(update={"params": "0.4x", "stop_after": "measure"})
    with pytest.raises(BadOutput, match="rounds"):
        compress(other)


@pytest.mark.slow
def test_a_run_that_is_killed_between_its_rounds_ends_with_the_same_bits(in_rounds, tmp_path, monkeypatch):
    again = in_rounds.recipe.model_copy(update={"to": str(tmp_path / "run")})
    made, prune = [], pipeline.prune

    def killed(*args, **options):
        made.append(options["to"])
        if len(made) == 2:
            raise Stopped("killed")
        return prune(*args, **options)

    monkeypatch.setattr(pipeline, "prune", killed)
    with pytest.raises(Stopped):
        compress(again)
    assert made[0].parent.name == LARGER
    monkeypatch.setattr(pipeline, "prune", prune)
    student, undisturbed = compress(again).distilled, in_rounds.distilled
    assert all(torch.equal(student.tensor(name), undisturbed.tensor(name)) for name in undisturbed.stored)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: model.tensor(name) for name in model.stored}


def assert_same_bits(found, expected) -> None:
    assert found.architecture == expected.architecture
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(found).items())


@pytest.mark.slow
def test_a_run_in_rounds_is_redone_from_its_larger_student_on(whole_model, corpus, tmp_path):
    """As if it had been made with the new recipe in the first place."""

    def made(name: str, rate: float, **options: bool) -> Run:
        settings = SMALL["distill"] | {"learning_rate": rate}
        values = {"params": "0.5x", "distill": settings, "stop_after": "distill"}
        return compress(make_recipe(whole_model, corpus, tmp_path / name, **values), **options)

    made("again", 1e-5)
    with pytest.raises(BadOutput, match=r"distill.*the larger student|the larger student.*distill"):
        made("again", 1e-3)
    assert_same_bits(made("again", 1e-3, redo=True).distilled, made("fresh", 1e-3).distilled)


@pytest.mark.slow
def test_the_baseline_has_the_tokens_of_all_rounds(whole_model, corpus, tmp_path):
    values = {"params": "0.5x", "baseline": True, "stop_after": "distill"}
    run = compress(make_recipe(whole_model, corpus, tmp_path / "run", **values))
    folders = (LARGER + "/4-distilled", "4-distilled", "4-baseline")
    larger, student, baseline = (
        json.loads((run.root / folder / "training.json").read_text())["tokens"] for folder in folders
    )
    assert baseline == larger + student == SMALL["distill"]["tokens"]


@pytest.mark.slow
def test_a_limit_that_the_larger_student_keeps_already(whole_model, corpus, tmp_path):
    run = compress(make_recipe(whole_model, corpus, tmp_path / "run", params="0.5x", kv_cache="0.9x"))
    params, kv_cache = json.loads((run.root / "5-report.json").read_text())["budget"]["limits"]
    assert params["counted"] == pytest.approx(params["target"], rel=0.01)
    assert kv_cache["counted"] <= kv_cache["target"]
    further = {"to": str(tmp_path / "other"), "start": str(run.path("distill")), "params": "0.8x", "kv_cache": None}
    with pytest.raises(BadRecipe, match="keeps its budget already"):
        compress(run.recipe.model_copy(update=further))
    timed = compress(run.recipe.model_copy(update=further | {"latency": "0.5x", "stop_after": "search"}))
    assert timed.candidates["candidates"]


def test_a_plan_knows_the_rounds(invoke, whole_model, corpus, tmp_path):
    values = [str(whole_model), *small_flags(corpus, tmp_path / "run", budget=("--params", "0.35x")), "--json"]
    machine = ("--gpus", "1", "--tflops", "1", "--gigabytes", "80", "--set", "distill.micro_blocks=4")
    plans = [json.loads(invoke("plan", *values, *machine, "--set", f"rounds={r}").stdout) for r in ("true", "false")]
    whole = plans[0]["teacher"]["parameters"]
    larger = [each["parameters"] for each in plans[0]["larger_students"]]
    assert larger == pytest.approx([0.35 ** (1 / 3) * whole, 0.35 ** (2 / 3) * whole], rel=0.02)
    assert [each["tokens"] for each in plans[0]["larger_students"]] == [1024 // 3 // 128 * 128] * 2
    assert plans[1]["larger_students"] == []
    assert plans[0]["peak_memory_bytes"] > plans[1]["peak_memory_bytes"]
    assert plans[0]["disk_bytes"] > 3 * plans[1]["disk_bytes"]
    assert plans[0]["writes"][0].endswith(LARGER)
    assert plans[0]["seconds"]["larger student"] > plans[0]["seconds"]["distill"]
    shown = invoke("plan", *values[:-1]).stdout
    assert shown.count("In rounds: first a student of") == 2


@pytest.fixture(scope="module")
def several(whole_model, corpus, tmp_path_factory) -> recipe.Recipe:
    settings = SMALL["distill"] | {"teacher_cache": "samples"}
    to = tmp_path_factory.mktemp("sizes") / "runs"
    made = make_recipe(whole_model, corpus, to, params="0.7x,0.9x", distill=settings)
    assert compress(made).root.name == "0.7x"
    return made


def test_each_size_is_cut_out_of_the_next_larger_one(several):
    large, small = (Run(Path(member.to), member) for member in members(several))
    assert [run.root.name for run in (large, small)] == ["0.9x", "0.7x"]
    assert large.parent is large.teacher
    assert small.parent.fingerprint == large.distilled.fingerprint
    assert small.teacher.fingerprint == large.teacher.fingerprint
    assert small.distilled.parameters == pytest.approx(0.7 * small.teacher.parameters, rel=0.01)
    files = ("0-text/train/tokens.npy", "4-teacher-cache/manifest.json")
    assert all((small.root / file).samefile(large.root / file) for file in files)


def test_a_stage_that_is_done_again_for_all_sizes_goes_on_after_a_kill(several, tmp_path, monkeypatch):
    root = shutil.copytree(several.to, tmp_path / "runs", copy_function=os.link)
    moved, trained, distill = several.model_copy(update={"to": str(root)}), [], pipeline.distill

    def noted(*args, to, **options):
        trained.append(to.parent.name)
        if trained == ["0.9x", "0.7x"]:
            raise Stopped("killed")
        return distill(*args, to=to, **options)

    monkeypatch.setattr(pipeline, "distill", noted)
    with pytest.raises(Stopped):
        compress(moved, redo=True, redo_stage="distill")
    compress(moved, redo=True, redo_stage="distill")
    assert trained == ["0.9x", "0.7x", "0.7x"]
    compress(moved, redo=True, redo_stage="distill")
    assert trained[3:] == ["0.9x", "0.7x"]


@pytest.mark.slow
def test_a_size_whose_larger_one_was_redone_is_redone(whole_model, corpus, tmp_path):
    def made(name: str, rate: float, **options: bool) -> Run:
        settings = SMALL["distill"] | {"learning_rate": rate}
        values = {"params": "0.9x,0.8x", "distill": settings, "stop_after": "distill"}
        return compress(make_recipe(whole_model, corpus, tmp_path / name, **values), **options)

    made("again", 1e-5)
    again, fresh = made("again", 1e-3, redo=True), made("fresh", 1e-3)
    assert again.parent.fingerprint == fresh.parent.fingerprint
    assert_same_bits(again.distilled, fresh.distilled)


def test_the_page_of_all_sizes(several):
    root = Path(several.to)
    family = json.loads((root / "family.json").read_text())
    assert [size["name"] for size in family["sizes"]] == ["0.9x", "0.7x"]
    for size in family["sizes"]:
        found = json.loads((root / size["name"] / "5-report.json").read_text())
        assert size["parameters"] == found["student"]["parameters"]
        assert size["perplexity"] == found["models"][-1]["perplexity"]
    page = (root / "report.html").read_text()
    assert all(f'href="{size}/report.html"' in page for size in ("0.9x", "0.7x"))
    assert page.count("<svg ") == 1
    assert is_run(root)  # the folder alone says what to go on with
    assert recipe.parse(recipe.read_yaml(root / "recipe.yaml"), source="test") == several


def test_sizes_that_stop_early_still_train_what_others_are_cut_from(whole_model, corpus, tmp_path):
    made = make_recipe(whole_model, corpus, tmp_path, params="0.9x,0.8x,0.7x", stop_after="search")
    assert [member.stop_after for member in members(made)] == ["distill", "distill", "search"]


def test_the_command_line_shows_every_size(invoke, several):
    shown = invoke("compress", several.to)
    assert shown.exit_code == 0, shown.stderr
    assert all(size in shown.stdout for size in ("0.9x", "0.7x", "report.html"))
    runs = json.loads(invoke("compress", several.to, "--json").stdout)["runs"]
    assert all((Path(run) / "4-distilled").is_dir() for run in runs)
    page = Path(several.to) / "report.html"
    page.unlink()
    assert invoke("report", several.to).exit_code == 0
    assert page.is_file()
    refused = invoke("plan", several.to)
    assert refused.exit_code == 2
    assert "one size at a time" in refused.stderr


def test_several_sizes_and_another_budget_cannot_be_combined(whole_model, corpus, tmp_path):
    with pytest.raises(BadRecipe, match="several sizes, which flops cannot"):
        make_recipe(whole_model, corpus, tmp_path, params="0.9x,0.8x", flops="0.7x")
    with pytest.raises(BadRecipe, match=r"0\.9y"):
        make_recipe(whole_model, corpus, tmp_path, params="0.8x,0.9y")


@pytest.mark.parametrize(("params", "error"), [("0.9x,0.001x", BudgetUnreachable), ("1.5x,0.9x", BadRecipe)])
def test_a_size_that_cannot_be_had_is_refused_before_the_others_are_made(whole_model, corpus, tmp_path, params, error):
    with pytest.raises(error):
        compress(make_recipe(whole_model, corpus, tmp_path / "runs", params=params))
    assert not (tmp_path / "runs").exists()


def test_workers_without_ray_or_work_are_refused_at_once(whole_model, corpus, tmp_path, monkeypatch):
    with pytest.raises(BadRecipe, match=r"search\.tokens"):
        make_recipe(whole_model, corpus, tmp_path, search={"workers": 2})
    monkeypatch.setattr("prunus.side_by_side.importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadRecipe, match=r"prunus\[ray\]"):
        compress(make_recipe(whole_model, corpus, tmp_path / "run", search={"workers": 2, "tokens": 512}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sizes_may_be_moved_and_their_page_goes_with_what_it_shows(whole_model, corpus, invoke, tmp_path):
    compress(make_recipe(whole_model, corpus, tmp_path / "made", params="0.9x,0.4x"))
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    weights = [moved / size / "4-distilled" / "model.safetensors" for size in ("0.9x", "0.4x", "0.4x/0-larger")]
    before = [file.stat().st_mtime_ns for file in weights]
    assert invoke("report", str(moved)).exit_code == 0
    assert invoke("evaluate", str(moved)).exit_code == 0
    assert (moved / "report.html").is_file()
    again = ("--set", "evaluate.limit=1", "--redo", "--stop-after", "evaluate")
    assert invoke("compress", str(moved), *again).exit_code == 0
    assert not (moved / "report.html").exists()
    assert invoke("compress", str(moved)).exit_code == 0
    assert (moved / "report.html").is_file()
    assert [file.stat().st_mtime_ns for file in weights] == before


def test_a_start_that_keeps_one_of_two_limits_is_cut_once(in_rounds, corpus, tmp_path):
    student = in_rounds.distilled
    limits = {"params": "0.95x", "memory": "0.3x", "start": str(student.folder)}
    made = Run(tmp_path / "run", make_recipe(Path(in_rounds.recipe.model), corpus, tmp_path / "run", **limits))
    assert student.parameters < 0.95 * made.teacher.parameters
    assert made.rounds == Rounds()
