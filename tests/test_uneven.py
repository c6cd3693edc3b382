"""Layers that lose attention alone: the same model at first, and what other programs find in the checkpoint."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import add_tokenizer, small_flags, tiny_model
from test_pipeline import make_recipe

import prunus as pr
from prunus.checkpoint import Checkpoint
from prunus.errors import BudgetUnreachable, UnsupportedModel
from prunus.importance import score
from prunus.measure import measure
from prunus.run import Run
from prunus.selection import ranked_layers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("uneven")
    tiny_model("llama", folder, intermediate_size=512)
    add_tokenizer(folder)
    return pr.load(folder, uneven=True)


@pytest.fixture(scope="module")
def scores(teacher, blocks):
    return score(measure(teacher, blocks))


def block_configs(folder: Path) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["block_configs"]


def logits(model: torch.nn.Module, blocks) -> torch.Tensor:
    tokens, _ = blocks.batch([0, 1])
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_it_is_the_same_model_of_twice_as_many_layers(teacher, blocks):
    whole = pr.load(teacher.folder)
    assert teacher.architecture.layers == 2 * whole.architecture.layers
    assert teacher.parameters == whole.parameters
    assert torch.equal(logits(teacher.module(), blocks), logits(whole.module(), blocks))


@pytest.mark.parametrize("layers", range(1, 8))
def test_no_attention_stays_without_the_ffn_behind_it(teacher, scores, layers, tmp_path):
    student = pr.prune(teacher, scores, teacher.architecture.replace(layers=layers), to=tmp_path / "student")
    found = block_configs(student.folder)
    branches = [part for block in found for part in ("attention", "ffn") if not block[part]["no_op"]]
    assert len(branches) == student.architecture.layers == layers
    if layers > 1:  # a single branch is the first attention, which llama.cpp would drop
        assert not any(block["ffn"]["no_op"] for block in found)
    assert not found[0]["attention"]["no_op"]


def test_nor_the_first_attention_without_its_ffn_though_both_score_low(teacher, scores):
    low_L = torch.tensor([0.1, 0.05, 0.5, 0.6, 0.4, 0.7, 0.3, 0.8])
    order = ranked_layers(dataclasses.replace(scores, axes={**scores.axes, "layers": low_L}), teacher.architecture)
    assert order == [0, 1, 7, 5, 3, 2, 4, 6]


def test_the_order_of_branches_is_theirs_by_score_but_for_that(teacher, scores):
    order = ranked_layers(scores, teacher.architecture)
    assert order[0] == 0
    assert all(order.index(ffn) < order.index(ffn - 1) for ffn in range(3, 8, 2))
    attention = [layer for layer in order if layer % 2 == 0 and layer]
    assert attention == sorted(attention, key=lambda layer: -float(scores["layers"][layer]))


OTHER_PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "prunus" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = model(input_ids=tokens).logits
assert (found - expected).norm() / expected.norm() < 1e-5
"""


@pytest.mark.slow
def test_transformers_alone_reads_it_with_the_code_that_goes_along(teacher, scores, blocks, tmp_path):
    student = pr.prune(teacher, scores, teacher.architecture.replace(layers=5), to=tmp_path / "student")
    tokens, _ = blocks.batch([0, 1])
    torch.save((tokens, logits(student.module(), blocks)), tmp_path / "expected.pt")
    subprocess.run(
        [sys.executable, "-P", "-c", OTHER_PROGRAM, str(student.folder), str(tmp_path / "expected.pt")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=True,
    )


def test_a_student_can_be_cut_again(teacher, scores, blocks, tmp_path):
    once = pr.prune(teacher, scores, teacher.architecture.replace(layers=6), to=tmp_path / "once")
    opened = pr.load(once.folder)
    assert opened.architecture == once.architecture
    target = opened.architecture.replace(layers=4, ffn=256)
    twice = pr.prune(opened, score(measure(opened, blocks)), target, to=tmp_path / "twice", calibration=blocks)
    assert {block["ffn"]["ffn_mult"] for block in block_configs(twice.folder)} == {1.5 * 256 / 48}
    assert twice.parameters == sum(parameter.numel() for parameter in twice.module().parameters())


def test_compress_makes_one_and_says_how_to_load_it(teacher, corpus, invoke, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", budget=("--arch", "layers=5,ffn=256"))
    result = invoke("compress", str(teacher.folder), *flags, "--uneven")
    assert result.exit_code == 0, result.stderr
    student = tmp_path / "run" / "4-distilled"
    assert sum(block["attention"]["no_op"] for block in block_configs(student)) == 1
    assert "trust_remote_code=True" in (student / "README.md").read_text()
    assert (student / "modeling_decilm.py").is_file()


def test_what_a_run_starts_from_has_uneven_layers_too(teacher, corpus, tmp_path):
    values = {"uneven": True, "start": str(teacher.folder), "params": "0.8x"}
    run = Run(tmp_path / "run", make_recipe(teacher.folder, corpus, tmp_path / "run", **values))
    assert run.first.architecture == run.teacher.architecture == teacher.architecture


def test_types_without_uneven_layers_are_refused(invoke, corpus, tmp_path):
    tiny_model("qwen3", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    result = invoke("compress", str(tmp_path / "model"), *small_flags(corpus, tmp_path / "run"), "--uneven")
    assert result.exit_code == 2
    assert "'qwen3' cannot have uneven layers" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_list_of_the_kinds_of_layers_is_not_minded(teacher, blocks, tmp_path):
    """Llama reads none, and one of whole layers would not follow their branches."""
    folder = shutil.copytree(teacher.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 4}))
    opened = pr.load(folder, uneven=True)
    student = pr.prune(opened, score(measure(opened, blocks)), opened.architecture.replace(layers=6), to=tmp_path / "s")
    assert pr.load(student.folder).architecture.layers == 6


def test_a_window_is_more_than_llama_has(tmp_path):
    tiny_model("mistral", tmp_path / "whole", sliding_window=None)
    assert pr.load(tmp_path / "whole", uneven=True).architecture.layers == 8
    tiny_model("mistral", tmp_path / "windowed", sliding_window=8)
    with pytest.raises(UnsupportedModel, match="uneven"):
        pr.load(tmp_path / "windowed", uneven=True)


def test_widths_that_its_config_cannot_name_are_refused(teacher, scores, tmp_path):
    with pytest.raises(BudgetUnreachable, match="multiple of 256"):
        pr.prune(teacher, scores, teacher.architecture.replace(ffn=300), to=tmp_path / "student")


def test_layers_of_several_widths_are_refused(teacher, scores, invoke, tmp_path):
    student = pr.prune(teacher, scores, teacher.architecture.replace(layers=6), to=tmp_path / "student")
    folder = shutil.copytree(student.folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    config["block_configs"][1]["ffn"]["ffn_mult"] = 2.0
    (folder / "config.json").write_text(json.dumps(config))
    result = invoke("inspect", str(folder))
    assert result.exit_code == 2
    assert "layers differ in ffn_mult" in result.stderr
