"""The whole pipeline on a tiny model, through the command line: files, resuming, and refusals."""

import gc
import importlib.util
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import SMALL, WORDS, add_tokenizer, make_text, seen, small_flags, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from prunus import hardware, recipe, results, source
from prunus.checkpoint import Checkpoint, load
from prunus.comparison import compare
from prunus.errors import BadOutput, BadRecipe
from prunus.evaluate import quality
from prunus.families import family_of
from prunus.pipeline import compress
from prunus.recipe import STAGES
from prunus.results import collect
from prunus.run import OUTPUTS
from prunus.text import batch_indices


def make_recipe(model: Path, corpus: Path, to: Path, **changes: object) -> recipe.Recipe:
    values = SMALL | {"model": str(model), "to": str(to), "params": "0.7x"}
    values["data"] = SMALL["data"] | {"train": str(corpus)}
    return recipe.parse(values | changes, source="test")


@pytest.fixture(scope="module")
def run(whole_model, corpus, tmp_path_factory):
    to = tmp_path_factory.mktemp("runs") / "run"
    return compress(make_recipe(whole_model, corpus, to, baseline=True, evaluate={"speed": True}))


def test_every_stage_leaves_its_file(run):
    assert all((run.root / name).exists() for names in OUTPUTS.values() for name in names)
    assert not list(run.root.glob(".*partial*"))
    assert not list(run.root.glob(".*training*"))


def test_planned_counted_and_reported_parameters_are_one_number(run):
    report = json.loads((run.root / "5-report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run.root / "4-distilled")
    counted = sum(parameter.numel() for parameter in model.parameters())
    reported = {entry["key"]: entry["parameters"] for entry in report["models"]}
    (limit,) = report["budget"]["limits"]
    assert limit["planned"] == limit["counted"] == reported["distilled"] == counted
    assert counted == pytest.approx(0.7 * reported["teacher"], rel=0.01)
    assert list(reported) == ["teacher", "cut", "repaired", "distilled", "baseline"]


@pytest.mark.parametrize(("free", "most_models"), [(10**9, 2), (1, 1)])
def test_one_student_at_a_time_is_compared_with_the_teacher(run, monkeypatch, free, most_models):
    """Beside it, or after it where both do not fit."""
    alive, most = weakref.WeakSet(), []
    place = hardware.place

    def counted(model, **changes):
        alive.add(placed := place(model, **changes))
        gc.collect()  # what is in no one's hands counts no longer, whenever Python would have seen to it
        most.append(len(alive))
        return placed

    monkeypatch.setattr(hardware, "place", counted)
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    found = compare(run)
    assert [len(found["models"]), max(most)] == [5, most_models]
    known = json.loads((run.root / "5-evaluation.json").read_text())
    for again, model in zip(found["models"], known["models"], strict=True):
        assert again.keys() == model.keys()
        assert again["loss"] == pytest.approx(model["loss"])
        assert again["kl_to_teacher"] == pytest.approx(model["kl_to_teacher"])
    assert found["models"][0]["kl_to_teacher"] == 0
    assert found["samples"] == known["samples"]


def test_the_page_and_the_card_are_written(run):
    assert "Distilled" in (run.root / "report.html").read_text()
    assert (run.root / "4-distilled" / "README.md").read_text().startswith("---\n")
    assert (run.root / "4-distilled" / "tokenizer.json").is_file()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_layers_can_be_chosen_by_a_task(corpus, tmp_path):
    teacher = tiny_model("llama", tmp_path / "model", num_hidden_layers=6)
    add_tokenizer(teacher.folder)
    rows = [{"query": WORDS[number], "choices": list(WORDS[:3]), "gold": number % 3} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"name": "mine", "file": str(tmp_path / "rows.jsonl"), "query": "{{query}}"}
    task |= {"choices": "choices", "gold": "gold"}
    changes = {"measure": SMALL["measure"] | {"contiguous_by_task": task}, "score": {"layers": "contiguous_by_task"}}
    made = compress(make_recipe(teacher.folder, corpus, tmp_path / "run", stop_after="score", **changes))
    order = made.scores["layers"].argsort().tolist()
    assert max(order[:3]) - min(order[:3]) == 2, "three neighbours leave first"
    wrong = SMALL["measure"] | {"contiguous_by_task": task | {"gold": "god"}}
    with pytest.raises(BadRecipe, match="no field 'god'"):
        compress(make_recipe(teacher.folder, corpus, tmp_path / "other", measure=wrong, stop_after="score"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_layers_of_several_kinds_go_through_all_stages(family, corpus, tmp_path):
    teacher = tiny_model(family, tmp_path / "model")
    add_tokenizer(teacher.folder)
    made = compress(make_recipe(teacher.folder, corpus, tmp_path / "run", search={"candidates": 1, "tolerance": 0.05}))
    report = json.loads((made.root / "5-report.json").read_text())
    student = load(made.root / "4-distilled")
    (limit,) = report["budget"]["limits"]
    assert limit["planned"] == limit["counted"] == student.parameters
    assert set(report["student"]["architecture"]) == set(teacher.architecture)
    for name in student.stored:  # what is no parameter is not trained
        if family_of(family).split(name)[1] in family_of(family).buffers:
            assert torch.equal(student.tensor(name), load(made.root / "3-pruned").tensor(name))
    assert "experts" in (made.root / "report.html").read_text()


def test_what_sees_goes_through_all_stages_as_it_is(corpus, tmp_path):
    teacher = tiny_model("smolvlm", tmp_path / "model")
    add_tokenizer(teacher.folder)
    (teacher.folder / "preprocessor_config.json").write_text("{}")
    made = compress(make_recipe(teacher.folder, corpus, tmp_path / "run", params="0.75x"))
    student = load(made.root / "4-distilled")
    assert student.parameters == pytest.approx(0.75 * teacher.parameters, rel=0.01)
    assert (student.folder / "preprocessor_config.json").is_file()
    tower = [name for name in teacher.stored if name.startswith("model.vision_model.")]
    assert tower
    assert all(torch.equal(student.tensor(name), teacher.tensor(name)) for name in tower)
    connector = student.tensor("model.connector.modality_projection.proj.weight")
    assert torch.equal(
        connector, load(made.root / "3-pruned").tensor("model.connector.modality_projection.proj.weight")
    )
    model = AutoModelForImageTextToText.from_pretrained(student.folder)
    with torch.no_grad():
        assert model(**seen(model.config)).logits.isfinite().all()
    assert "vision" in json.loads((made.root / "5-report.json").read_text())["student"]["parameters_by_group"]


@pytest.mark.parametrize(("kept", "warned"), [([0, 1, 2, 3, 4, 5], False), ([0, 1, 3, 4, 5, 6], True)])
def test_a_pattern_of_attention_that_is_broken_is_told(tmp_path, kept, warned):
    """llama.cpp assumes it."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    teacher = tiny_model("gemma3_text", tmp_path / "teacher", num_hidden_layers=9, layer_types=kinds)
    student = tiny_model("gemma3_text", tmp_path / "student", num_hidden_layers=6, layer_types=[kinds[n] for n in kept])
    assert bool(results.warnings(teacher, student)) == warned


@pytest.mark.parametrize(
    ("name", "sizes", "named"),
    [
        ("qwen2", {"intermediate_size": 32}, []),
        ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}, []),
        ("qwen2", {"hidden_size": 40}, ["llama.cpp", "vLLM"]),
        ("granitemoe", {"hidden_size": 40}, ["vLLM"]),
        ("llama", {"hidden_size": 36}, []),
    ],
)
def test_a_program_that_does_not_load_the_student_is_told(tmp_path, name, sizes, named):
    square = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}
    teacher = tiny_model(name, tmp_path / "teacher", **square)
    student = tiny_model(name, tmp_path / "student", **square | sizes)
    told = results.warnings(teacher, student)
    assert [text.partition("'s own code for " + name)[0] for text in told] == named


def test_candidates_are_cut_as_the_student_will_be(whole_model, corpus, tmp_path):
    options = {"prune": {"repair": False, "norm_correction": False, "head_residuals": True}, "stop_after": "prune"}
    options["search"] = SMALL["search"] | {"candidates": 1}
    made = compress(make_recipe(whole_model, corpus, tmp_path / "run", params="0.5x", rounds=False, **options))
    (chosen,) = (each for each in made.candidates["candidates"] if each["chosen"])
    student = hardware.place(made.pruned.module(), dtype=hardware.compute_dtype())
    assert quality(student, made.validation).loss == pytest.approx(chosen["measured"]["loss"], rel=1e-5)


def test_a_second_call_changes_nothing(run):
    before = (run.root / "4-distilled" / "model.safetensors").stat().st_mtime_ns
    compress(run.recipe)
    assert (run.root / "4-distilled" / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_is_refused_unless_redone(run, whole_model, corpus):
    changed = make_recipe(whole_model, corpus, run.root, baseline=True, prune=SMALL["prune"] | {"damping": 0.02})
    with pytest.raises(BadOutput, match=r"changed: prune.*--redo"):
        compress(changed)
    before = (run.root / "1-scores.safetensors").stat().st_mtime_ns
    halfway = compress(changed.model_copy(update={"stop_after": "prune"}), redo=True)
    done = [stage["name"] for stage in collect(halfway)["stages"]]
    assert done == list(STAGES[: STAGES.index("prune") + 1]), "the time of what is stale does not count"
    compress(changed)
    assert (run.root / "1-scores.safetensors").stat().st_mtime_ns == before
    assert "0.02" in (run.root / "recipe.yaml").read_text()


def test_stages_run_alone_from_the_command_line(whole_model, corpus, tmp_path, invoke):
    assert invoke("score", str(whole_model), *small_flags(corpus, tmp_path / "run")).exit_code == 0
    assert (tmp_path / "run" / "1-scores.safetensors").exists()
    assert not (tmp_path / "run" / "2-candidates.json").exists()
    again = invoke("score", str(tmp_path / "run"), "--set", "score.ffn=magnitude", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["files"]["score"].endswith("1-scores.safetensors")
    assert "ffn: magnitude" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert invoke("prune", str(tmp_path / "run")).exit_code == 0
    assert (tmp_path / "run" / "3-pruned" / "model.safetensors").exists()


def test_training_begins_with_text_that_the_repair_has_not_seen(run):
    seen = {tuple(row) for row in run.repair_text.tokens.tolist()}
    assert {tuple(row) for row in run.calibration.tokens.tolist()} < seen
    settings = run.recipe.distill
    steps = settings.tokens // settings.batch_tokens
    blocks = [index for step in range(steps) for index in batch_indices(step, 4, len(run.train), settings.seed)]
    assert len(blocks) == settings.tokens // run.recipe.data.block_size
    assert not any(tuple(row) in seen for row in run.train.tokens[blocks].tolist())


def test_a_mixture_of_sources(whole_model, corpus, tmp_path):
    other = make_text(tmp_path / "other.jsonl", 150, seed=5)
    sources = [{"source": str(corpus), "weight": 3}, {"source": str(other)}]
    data = SMALL["data"] | {"train": sources}
    run = compress(make_recipe(whole_model, corpus, tmp_path / "run", data=data, stop_after="text"))
    assert run.train.source == f"{corpus} + {other}"
    assert len(run.train) > len(run.test) > 0


def test_training_from_a_cache(whole_model, corpus, tmp_path):
    options = SMALL["distill"] | {"teacher_cache": "samples", "hidden_loss": None}
    run = compress(make_recipe(whole_model, corpus, tmp_path / "run", distill=options, baseline=True))
    assert (run.root / "4-teacher-cache" / "manifest.json").is_file()
    assert run.finished("report")


@pytest.mark.slow
def test_a_baseline_can_be_added_later_and_stays(whole_model, corpus, tmp_path):
    root, seen, times = tmp_path / "run", [], set()
    for baseline in (False, True, False):
        compress(make_recipe(whole_model, corpus, root, baseline=baseline))
        models = json.loads((root / "5-report.json").read_text())["models"]
        seen.append("baseline" in {entry["key"] for entry in models})
        times.add((root / "4-distilled" / "model.safetensors").stat().st_mtime_ns)
    assert seen == [False, True, True]
    assert len(times) == 1


def test_single_document_text_is_split_by_its_length(whole_model, tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(" ".join(WORDS) for _ in range(300)))
    values = make_recipe(whole_model, tmp_path / "one.txt", tmp_path / "run", stop_after="text")
    found = compress(values)
    assert len(found.train) > len(found.test) > 0


def test_masters_keep_small_updates(whole_model, corpus, tmp_path):
    """bf16 weights alone would lose updates of 2⁻⁹ of their size; float32 masters must not."""
    from prunus.masters import Masters

    model = AutoModelForCausalLM.from_pretrained(whole_model)
    masters = Masters(model, torch.bfloat16, weight_decay=0.0)
    name, master = next(iter(masters.values.items()))
    start = master.detach().clone()
    with torch.no_grad():
        for _ in range(64):
            master.mul_(1 + 2**-12)
    masters.publish()
    growth = float((masters.copies[name].detach().float() / start).median())
    assert growth == pytest.approx((1 + 2**-12) ** 64, rel=2**-7)
    assert masters.copies[name].dtype == torch.bfloat16


def test_a_model_larger_than_memory_is_measured_and_cut(whole_model, corpus, tmp_path, invoke, monkeypatch):
    """As the README says: nothing loads it whole on the way to a cut without repair."""
    load_whole = Checkpoint.module

    def only_others(checkpoint, *arguments):
        assert checkpoint.folder != whole_model
        return load_whole(checkpoint, *arguments)

    monkeypatch.setattr(Checkpoint, "module", only_others)
    monkeypatch.setattr(source, "SHARE_OF_MEMORY", 0)
    flags = small_flags(corpus, tmp_path / "run", budget=("--arch", "hidden=36,ffn=24"))
    done = invoke(
        "compress", str(whole_model), *flags, "--set", "prune.repair=false", "--stop-after", "prune", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert load(tmp_path / "run" / "3-pruned").architecture.ffn == 24


def test_a_page_without_the_baseline_that_is_wanted_is_refused(run, invoke, tmp_path):
    """An evaluation that lacks it would have to be made again, which a page alone is not worth."""
    copy = shutil.copytree(run.root, tmp_path / "run")
    shutil.rmtree(copy / "4-baseline")
    refused = invoke("report", str(copy), "--baseline")
    assert refused.exit_code == 2
    assert "no baseline" in refused.stderr
    assert invoke("compress", str(copy), "--baseline", "--stop-after", "prune").exit_code == 0
    assert (copy / "5-evaluation.json").read_text() == (run.root / "5-evaluation.json").read_text()
    assert (copy / "report.html").is_file()


def test_a_mistake_in_a_task_is_told_before_a_finished_run_is_trained_again(run, invoke, tmp_path):
    copy = shutil.copytree(run.root, tmp_path / "run")
    task = json.dumps({"name": "a", "file": "nowhere.jsonl", "query": "{{ q }}", "choices": "c", "gold": "g"})
    changes = ("--redo", "--set", "distill.learning_rate=1e-4", "--set", f"evaluate.tasks=[{task}]")
    refused = invoke("compress", str(copy), *changes)
    assert refused.exit_code == 2
    assert "no such file" in refused.stderr
    assert (copy / "4-distilled" / "model.safetensors").is_file()


def test_a_run_inside_the_folder_of_its_text_does_not_read_itself(whole_model, corpus, tmp_path, invoke):
    shutil.copy(corpus, tmp_path / "text.jsonl")
    flags = (*small_flags(tmp_path, tmp_path / "run"), "--stop-after", "text")
    assert invoke("compress", str(whole_model), *flags).exit_code == 0


def test_here_is_a_folder_for_the_result(whole_model, corpus, tmp_path, invoke, monkeypatch):
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path / "student")
    settings = ("--set", "teacher_cache=samples", "--tokens", "1k", "--to", ".")
    told = invoke("distill", str(whole_model), "--teacher", str(whole_model), "--data", str(corpus), *settings)
    assert told.exit_code == 0, told.stderr
    assert load(tmp_path / "student").parameters > 0
