"""Pulse: every command runs on a tiny model, says what it should, and nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIZES, add_tokenizer, make_text, small_flags, tiny_model
from test_recipe import RECIPES
from transformers import AutoModelForCausalLM

from prunus import checkpoint, hardware, memory, recipe, weights
from prunus.budget import parse_budget
from prunus.errors import DoesNotFit
from prunus.run import Run
from prunus.search import probe_architectures

COMMANDS = ("compress", "inspect", "plan", "measure", "score", "search", "prune", "distill", "evaluate", "report")


def done(result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result) -> dict:
    """All of stdout is one JSON value, and stderr has the lines of stages alone."""
    assert not [line for line in result.stderr.splitlines() if not line.endswith(" s")]
    return json.loads(done(result))


@pytest.fixture(scope="module")
def run_folder(whole_model, corpus, tmp_path_factory):
    """A finished run, by one process of the real command."""
    root = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "prunus", "compress", str(whole_model), *small_flags(corpus, root)]
    finished = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert set(json.loads(finished.stdout)["files"]) == set(recipe.STAGES)
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_help(invoke, command):
    text = done(invoke(command, "--help"))
    assert f"prunus {command}" in text
    assert "--json" in text


def test_help_lists_every_command(invoke):
    text = done(invoke("--help"))
    assert all(command in text for command in COMMANDS)


def test_inspect(invoke, whole_model):
    text = done(invoke("inspect", str(whole_model)))
    assert "llama" in text
    assert "residual stream" in text
    facts = as_json(invoke("inspect", str(whole_model), "--json"))
    model = AutoModelForCausalLM.from_pretrained(whole_model)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["next_smaller"] == {"layers": 3, "hidden": 42, "ffn": 39, "heads": 3, "kv_heads": 2}


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_what_a_model_is_made_of_is_told_without_reading_its_weights(
    invoke, whole_model, corpus, tmp_path, monkeypatch, command
):
    """Of a large one they are hundreds of gigabytes."""
    for way in ("whole", "numbered"):
        monkeypatch.setattr(weights.Parts, way, lambda parts: pytest.fail("weights are read"))
    monkeypatch.setattr(checkpoint, "sha256", lambda file: pytest.fail(f"{file} is read"))
    flags = small_flags(corpus, tmp_path / "run") if command == "plan" else []
    done(invoke(command, str(whole_model), *flags))


def test_plan_for_other_machines(invoke, whole_model, corpus, tmp_path):
    options = [*small_flags(corpus, tmp_path / "run"), "--set", "distill.batch_tokens=256"]
    machine = ("--tflops", "600", "--gigabytes", "80")
    one, eight = (
        as_json(invoke("plan", str(whole_model), *options, "--gpus", gpus, *machine, "--json")) for gpus in ("1", "8")
    )
    assert eight["seconds"]["distill"] == pytest.approx(one["seconds"]["distill"] / 8)
    together = one["teacher"]["parameters"] + one["student"]["parameters"]
    assert one["evaluation_memory_bytes"] == eight["evaluation_memory_bytes"] == 2 * together
    parts = [plan["peak_memory_parts"]["masters, gradients, Adam"] for plan in (one, eight)]
    assert parts[1] == parts[0] // 8
    cached = invoke("plan", str(whole_model), *options, *machine, "--set", "distill.teacher_cache=samples", "--json")
    assert as_json(cached)["disk_bytes"] == one["disk_bytes"] + 38 * (1024 + 1024)
    assert "on 8 GPUs" in done(invoke("plan", str(whole_model), *options, "--gpus", "8", *machine))
    refused = invoke("plan", str(whole_model), *options, "--gpus", "1", "--gigabytes", "0.0001")
    assert refused.exit_code == 2
    assert "This would fit" in refused.stderr or "Use shorter blocks" in refused.stderr
    impossible = invoke("plan", str(whole_model), *options, "--gpus", "1", "--tflops", "0")
    assert impossible.exit_code == 2
    assert "--tflops" in impossible.stderr


def test_a_plan_for_gpus_does_not_depend_on_this_machine(invoke, whole_model, corpus, tmp_path, monkeypatch):
    options = [*small_flags(corpus, tmp_path / "run"), "--gpus", "2", "--set", "distill.batch_tokens=512", "--json"]
    plans = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.bfloat16, "cuda")):
        monkeypatch.setattr(hardware, "compute_dtype", lambda dtype=dtype: dtype)
        monkeypatch.setattr(hardware, "device", lambda device=device: torch.device(device))
        plans.append(as_json(invoke("plan", str(whole_model), *options)))
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["repair_memory_bytes"] > 0
    assert plans[0]["search_memory_bytes"] > 0
    assert plans[0]["measure_memory_bytes"] > 0


def test_a_plan_knows_what_will_lie_on_the_disk(invoke, whole_model, corpus, run_folder, tmp_path):
    folders, kinds = ("0-text", "3-pruned", "4-distilled"), (".npy", ".safetensors")
    files = [file for name in folders for file in (run_folder / name).rglob("*") if file.suffix in kinds]
    plan = as_json(invoke("plan", str(whole_model), *small_flags(corpus, tmp_path / "run"), "--json"))
    assert plan["disk_bytes"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.05)
    assert all((run_folder / Path(file).relative_to(tmp_path / "run")).exists() for file in plan["writes"])


@pytest.mark.parametrize(
    ("options", "last", "models"),
    [
        (["stop_after=text"], "0-text/heldout", 0),
        (["stop_after=search", "distill.teacher_cache=samples"], "2-candidates.json", 0),
        (["stop_after=prune", "baseline=true"], "3-pruned", 1),
        (["stop_after=distill", "baseline=true"], "4-baseline", 3),
        (["stop_after=distill", "distill.teacher_cache=samples"], "4-teacher-cache", 2),
    ],
)
def test_a_plan_lists_what_is_written_up_to_where_a_run_stops(
    invoke, whole_model, corpus, tmp_path, options, last, models
):
    settings = [part for option in options for part in ("--set", option)]
    plan = as_json(invoke("plan", str(whole_model), *small_flags(corpus, tmp_path / "run"), *settings, "--json"))
    assert plan["writes"][-1] == f"{tmp_path}/run/{last}"
    cache = 38 * 2048 if last == "4-teacher-cache" else 0
    text = 96 * (32 * 4 + 8)
    assert plan["disk_bytes"] == models * plan["student"]["bytes"] + text + cache


def test_a_plan_that_stops_before_the_training_needs_no_memory_for_it(
    invoke, whole_model, corpus, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise DoesNotFit("training")

    monkeypatch.setattr(memory, "fitting", refuse)
    options = [str(whole_model), *small_flags(corpus, tmp_path / "run")]
    assert invoke("plan", *options).exit_code == 2
    plan = as_json(invoke("plan", *options, "--set", "stop_after=prune", "--json"))
    assert plan["training"] is None
    assert plan["peak_memory_bytes"] == 0
    assert plan["repair_memory_bytes"] > 0
    shown = done(invoke("plan", *options, "--set", "stop_after=score"))
    assert "Peak memory of the measurement" in shown
    assert not any(stage in shown for stage in ("training", "Distillation", "the search:", "the repair"))


def test_a_plan_of_longer_blocks_than_the_model_reads_is_refused(invoke, whole_model, corpus, tmp_path):
    options = [*small_flags(corpus, tmp_path / "run"), "--set", "data.block_size=256"]
    refused = invoke("plan", str(whole_model), *options)
    assert refused.exit_code == 2
    assert "data.block_size: 256 tokens, but the model knows 128 positions" in refused.stderr


def test_a_measurement_that_does_not_fit_is_planned_with_less_text(invoke, whole_model, corpus, tmp_path):
    options = [*small_flags(corpus, tmp_path / "run"), "--set", "measure.tokens=100M", "--set", "stop_after=score"]
    refused = invoke("plan", str(whole_model), *options, "--gpus", "1", "--gigabytes", "1")
    assert refused.exit_code == 2
    assert "measuring needs" in refused.stderr
    assert "This would fit: measure.tokens=" in refused.stderr


def test_the_time_of_a_search_is_that_of_the_models_it_builds(invoke, whole_model, corpus, tmp_path):
    options = [*small_flags(corpus, tmp_path / "run"), "--gpus", "1", "--json"]
    two, six = (
        as_json(invoke("plan", str(whole_model), *options, "--set", f"search.candidates={count}"))["seconds"]["search"]
        for count in (2, 6)
    )
    teacher = checkpoint.load(whole_model)
    budget = parse_budget(teacher, params="0.7x")
    probes = len(set(probe_architectures(teacher.family, teacher.architecture, budget).values()))
    assert six / two == pytest.approx((probes + 6) / (probes + 2))
    named = small_flags(corpus, tmp_path / "run", budget=("--arch", "ffn=20"))
    assert as_json(invoke("plan", str(whole_model), *named, "--json"))["seconds"]["search"] == 0


@pytest.mark.parametrize(
    ("setting", "stage", "times"),
    [
        ("measure.gradients=false", "measure", 1 / 4),  # 1 pass, 3 for gradients
        ("measure.contiguous=true", "measure", 1 + 1.5 * 4 * (1024 / 3) / (4 * 512)),
        ("search.tokens=4096", "search", None),
        ("distill.gradient_checkpointing=true", "distill", None),
    ],
)
def test_what_takes_longer_is_planned_to(invoke, whole_model, corpus, tmp_path, setting, stage, times):
    options = [*small_flags(corpus, tmp_path / "run"), "--gpus", "1", "--json"]
    plans = [as_json(invoke("plan", str(whole_model), *options, *more)) for more in ((), ("--set", setting))]
    before, after = (plan["seconds"].pop(stage) for plan in plans)
    assert after / before == pytest.approx(times) if times else after > before
    assert plans[0]["seconds"] == plans[1]["seconds"]


@pytest.mark.parametrize("budget", [("--params", "0.7x"), ("--memory", "0.8x"), ("--arch", "ffn=20,layers=3")])
def test_plan_writes_nothing(invoke, whole_model, corpus, tmp_path, budget):
    options = [*small_flags(corpus, tmp_path / "run", budget=budget)]
    assert "Would write" in done(invoke("plan", str(whole_model), *options))
    plan = as_json(invoke("plan", str(whole_model), *options, "--json"))
    assert plan["training"]["tokens"] == 1024
    assert plan["student"]["parameters"] < plan["teacher"]["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_plan_needs_no_folder(invoke, whole_model, corpus):
    options = [str(whole_model), "--params", "0.7x", "--data", str(corpus), "--tokens", "1k"]
    options += ["--set", "data.block_size=32"]
    plan = as_json(invoke("plan", *options, "--json"))
    assert all(file.startswith("RUN/") for file in plan["writes"])
    refused = invoke("compress", *options)
    assert (refused.exit_code, "to is missing" in refused.stderr) == (2, True)


@pytest.mark.parametrize("stage", ["measure", "score", "search", "prune"])
def test_stages_alone(invoke, whole_model, corpus, tmp_path, stage):
    found = as_json(invoke(stage, str(whole_model), *small_flags(corpus, tmp_path / "run"), "--json"))
    assert list(found["files"]) == list(recipe.STAGES[: recipe.STAGES.index(stage) + 1])


def test_an_explicit_architecture(invoke, whole_model, corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", budget=("--arch", "hidden=42,ffn=24,layers=3"))
    assert "hidden=42" in done(invoke("prune", str(whole_model), *flags))
    config = json.loads((tmp_path / "run" / "3-pruned" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (42, 24, 3)


def test_a_budget_of_memory(invoke, whole_model, corpus, tmp_path):
    done(invoke("search", str(whole_model), *small_flags(corpus, tmp_path / "run", budget=("--memory", "0.7x"))))
    budget = json.loads((tmp_path / "run" / "2-candidates.json").read_text())["budget"]
    (limit,) = budget["limits"]
    assert limit["unit"] == "bytes"
    assert limit["planned"] == pytest.approx(limit["target"], rel=0.01)


def test_stages_of_a_run_again(invoke, run_folder):
    assert as_json(invoke("evaluate", str(run_folder), "--json"))["files"]["evaluate"]
    assert "Distilled" in done(invoke("report", str(run_folder)))
    again = as_json(invoke("distill", str(run_folder), "--tokens", "640", "--json"))
    assert "evaluate" not in again["files"]
    done(invoke("compress", str(run_folder)))
    report = json.loads((run_folder / "5-report.json").read_text())
    assert report["training"]["tokens"] == 640


def test_a_report_again_does_nothing_else(invoke, whole_model, corpus, tmp_path):
    root = tmp_path / "run [x] %"
    done(invoke("score", str(whole_model), *small_flags(corpus, root)))
    shown = done(invoke("report", str(root)))
    assert shown.endswith(f"Wrote {root}/report.html\n")  # to be copied, however long
    assert (root / "5-report.json").is_file()
    assert not (root / "2-candidates.json").exists()


def test_a_run_that_was_moved_or_copied(invoke, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    before = {file: file.stat().st_mtime_ns for file in run_folder.rglob("*")}
    found = as_json(invoke("prune", str(copy), "--set", "prune.damping=0.1", "--json"))
    assert found["files"]["prune"] == str(copy / "3-pruned")
    assert {file: file.stat().st_mtime_ns for file in run_folder.rglob("*")} == before


def test_a_teacher_that_was_moved_is_the_same_teacher(invoke, whole_model, run_folder, tmp_path):
    copy, moved = shutil.copytree(run_folder, tmp_path / "run"), shutil.copytree(whole_model, tmp_path / "moved")
    done(invoke("compress", str(copy), "--set", f"model={moved}", "--stop-after", "prune"))
    assert recipe.read_yaml(copy / "recipe.yaml")["model"] == str(moved)


def test_page_and_card_say_what_was_evaluated_last(invoke, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    done(invoke("evaluate", str(copy), "--set", "evaluate.speed=false"))
    assert "Speed was not measured" in (copy / "4-distilled/README.md").read_text()
    assert "Speed was not measured" in (copy / "report.html").read_text()


def test_a_recipe_is_distilled_where_it_is_said(invoke, run_folder, tmp_path):
    options = ["--to", str(tmp_path / "elsewhere"), "--tokens", "640", "--json"]
    found = as_json(invoke("distill", str(run_folder / "recipe.yaml"), *options))
    assert found["run"] == str(tmp_path / "elsewhere")


def test_a_key_is_put_back_to_its_default(invoke, run_folder, tmp_path):
    options = ["--to", str(tmp_path / "run"), "--set", "distill.learning_rate=0.01", "--stop-after", "text"]
    done(invoke("compress", str(run_folder / "recipe.yaml"), *options))
    done(invoke("score", str(tmp_path / "run"), "--set", "distill.learning_rate=null"))
    assert recipe.read_yaml(tmp_path / "run" / "recipe.yaml")["distill"]["learning_rate"] is None


def test_home_is_not_a_folder_of_that_name(invoke, whole_model, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done(invoke("score", str(whole_model), *small_flags(corpus, Path("~/run"))))
    assert (tmp_path / "run" / "1-scores.safetensors").is_file()


def test_the_run_folder_is_a_recipe(invoke, run_folder, tmp_path):
    made = recipe.parse(recipe.read_yaml(run_folder / "recipe.yaml"), source="test")
    assert made.params == "0.7x"
    copied = as_json(invoke("score", str(run_folder / "recipe.yaml"), "--to", str(tmp_path / "run"), "--json"))
    scores = [Run(root, made).scores for root in (run_folder, tmp_path / "run")]
    assert copied["run"] == str(tmp_path / "run")
    assert all((scores[0][axis] == scores[1][axis]).all() for axis in ("hidden", "ffn", "heads"))


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """Enough for blocks of 512 tokens."""
    return make_text(tmp_path_factory.mktemp("long") / "text.jsonl", 60, seed=3)


def test_distill_any_model(invoke, whole_model, run_folder, long_text, tmp_path):
    student = str(run_folder / "3-pruned")
    options = [
        "--teacher",
        str(whole_model),
        "--data",
        str(long_text),
        "--tokens",
        "1024",
        "--to",
        str(tmp_path / "out"),
    ]
    found = as_json(invoke("distill", student, *options, "--set", "distill.seed=2", "--json"))
    assert found == {"student": str(tmp_path / "out")}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = invoke("distill", student, *options)
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    lacking = invoke("distill", student, "--data", str(long_text))
    assert lacking.exit_code == 2
    assert "distill needs --teacher, --to" in lacking.stderr


def test_distill_from_a_teacher_with_other_padding(invoke, whole_model, long_text, tmp_path):
    """As Qwen2.5's: 151,936 rows below 3B parameters, 152,064 above."""
    teacher = tiny_model("llama", tmp_path / "teacher", vocab_size=SIZES["vocab_size"] + 31)
    add_tokenizer(teacher.folder)
    options, to = ["--data", str(long_text), "--tokens", "1024", "--teacher", str(teacher.folder)], tmp_path / "out"
    by_ids = invoke("distill", str(whole_model), *options, "--to", str(to), "--set", "distill.teacher_cache=samples")
    assert by_ids.exit_code == 2
    assert "such an id could be missing in one" in by_ids.stderr
    done(invoke("distill", str(whole_model), *options, "--to", str(to)))
    distances = [
        as_json(invoke("evaluate", str(model), *options, "--set", "speed=false", "--json"))["kl_to_teacher"]
        for model in (whole_model, to)
    ]
    assert distances[1] < distances[0]
    assert AutoModelForCausalLM.from_pretrained(to).config.vocab_size == SIZES["vocab_size"]


def test_evaluate_any_model(invoke, whole_model, run_folder, long_text):
    model = str(run_folder / "4-distilled")
    alone = as_json(invoke("evaluate", model, "--json"))
    assert alone["prefill_tokens_per_second"] > 0
    assert "perplexity" not in alone
    assert "prefill_tokens_per_second" not in as_json(invoke("evaluate", model, "--set", "speed=false", "--json"))
    assert "did you mean 'speed'" in invoke("evaluate", model, "--set", "evaluate.sped=false").stderr
    options = ["--data", str(long_text), "--tokens", "1024"]
    compared = as_json(invoke("evaluate", model, "--teacher", str(whole_model), *options, "--json"))
    assert compared["kl_to_teacher"] > 0
    assert compared["perplexity"] > 1
    itself = as_json(invoke("evaluate", str(whole_model), "--teacher", str(whole_model), *options, "--json"))
    assert itself["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert itself["top1_agreement"] == 1
    assert "perplexity" in done(invoke("evaluate", model, *options))
    refused = invoke("evaluate", model, "--teacher", str(whole_model), "--json")
    assert (refused.exit_code, "give some with --data" in refused.stderr) == (2, True)
    wrong = invoke("evaluate", model, "--data", str(long_text), "--tokens", "10Q")
    assert wrong.exit_code == 2
    assert "tokens: '10Q' is not a quantity" in wrong.stderr


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_recipes_are_planned_on_a_model_of_ours(invoke, whole_model, tmp_path, file):
    """A dry run of every recipe, with the model replaced by a tiny one."""
    budget = ["--params", "0.7x", "--set", "data.block_size=32", "--to", str(tmp_path / "run")]
    plan = as_json(invoke("plan", str(file), "--set", f"model={whole_model}", *budget, "--json"))
    assert plan["training"]["steps"] > 0


def test_a_gguf_file_is_opened_quietly(invoke, tmp_path, monkeypatch, capsys):
    """Including the first time, when transformers dequantises it and shows a bar of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_gguf(tmp_path / "tiny.gguf", tmp_path)
    capsys.readouterr()
    for _ in range(2):
        result = invoke("inspect", str(tmp_path / "tiny.gguf"), "--json")
        assert result.stderr == ""
        assert as_json(result)["architecture"]["hidden"] == 32


def make_gguf(file, folder) -> None:
    """A Llama of one layer with random weights and a byte-level vocabulary."""
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    add_tokenizer(folder / "tokenizer")
    spec = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(spec["vocab"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(spec["vocab"], key=spec["vocab"].get))
    writer.add_token_types([1] * len(spec["vocab"]))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"]])
    for role in ("bos", "eos", "unk"):
        getattr(writer, f"add_{role}_token_id")(0)
    shapes = {"token_embd": (len(spec["vocab"]), 32), "output_norm": (32,), "output": (len(spec["vocab"]), 32)}
    layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,),
             "ffn_gate": (40, 32), "ffn_up": (40, 32), "ffn_down": (32, 40), "ffn_norm": (32,)}  # fmt: skip
    for name, shape in (shapes | {f"blk.0.{part}": shape for part, shape in layer.items()}).items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_distill_alone_heeds_every_setting(invoke, whole_model, corpus, tmp_path):
    """A student that was cut: from a cache with held-out losses, then live with hidden states."""
    run = tmp_path / "run"
    assert invoke("prune", str(whole_model), *small_flags(corpus, run)).exit_code == 0
    command = ["distill", str(run / "3-pruned"), "--teacher", str(whole_model), "--data", str(corpus)]
    command += ["--tokens", "16k", "--heldout", str(corpus), "--set", "batch_tokens=2048"]
    settings = ("--set", "teacher_cache=samples", "--set", "evaluate_every=2")
    assert invoke(*command, "--to", str(tmp_path / "a"), *settings).exit_code == 0
    assert (tmp_path / "a-teacher-cache" / "manifest.json").is_file()
    curve = json.loads((tmp_path / "a" / "training.json").read_text())["curve"]
    assert "heldout_loss" in curve[1]
    assert invoke(*command, "--to", str(tmp_path / "b"), "--set", "hidden_loss=mse").exit_code == 0
    assert "hidden_loss" in json.loads((tmp_path / "b" / "training.json").read_text())["curve"][0]


def test_distill_alone_says_what_held_out_losses_need(invoke, whole_model, corpus, tmp_path):
    command = ["distill", str(whole_model), "--teacher", str(whole_model), "--data", str(corpus)]
    refused = invoke(*command, "--to", str(tmp_path / "a"), "--set", "evaluate_every=2")
    assert refused.exit_code == 2
    assert "--heldout" in refused.stderr


@pytest.mark.parametrize("command", ["report", "evaluate", "compress", "plan"])
def test_a_run_that_is_not_there_is_called_that(invoke, tmp_path, command):
    refused = invoke(command, str(tmp_path / "nowhere"))
    assert refused.exit_code == 2
    assert "no such" in refused.stderr
    assert "is missing" not in refused.stderr
