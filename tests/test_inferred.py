"""Families that no file describes: what is inferred of a type is what its file says, where there is one; a type without
one is cut, saved and reloaded as those that have one."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prune import assert_cache_changes_nothing, cut_and_reload, drawn, logits
from transformers import AutoConfig

import prunus as pr
from prunus import anatomy, cost, dims, hardware, memory
from prunus.budget import parse_budget
from prunus.checkpoint import Checkpoint
from prunus.errors import UnsupportedModel
from prunus.families import _probes, family_of, known_families
from prunus.families._inferred import infer
from prunus.families._tiny import random_model
from prunus.head import head_of
from prunus.importance import score
from prunus.measure import measure
from prunus.prune import prune
from prunus.selection import illegal_cut
from prunus.space import legal_architectures

INFERRED = (
    *("afmoe", "apertus", "aria_text", "biogpt", "codegen", "deepseek_v32", "diffllama", "flint", "glm4_moe_lite"),
    *("glm_moe_dsa", "gpt_neo", "granitemoe_swa", "hy_v3", "hyperclovax", "kolibri1", "nanochat", "olmo", "opt"),
    *("xglm", "youtu"),
)


def test_the_page_of_model_types_lists_them():
    page = (Path(pr.__file__).parents[2] / "docs" / "families.md").read_text()
    by = {how: set(re.findall(rf"^\| `(\S+)` \| {how} \|", page, re.MULTILINE)) for how in ("file", "experiment")}
    assert by == {"file": set(known_families()), "experiment": set(INFERRED)}


def tiny(model_type: str) -> object:
    config = AutoConfig.for_model(model_type)
    return _probes.tiny(config, {size: _probes.BASE[size] for size in _probes.fields_of(config)})


@pytest.fixture(scope="module", params=INFERRED)
def inferred(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    random_model(tiny(request.param)).save_pretrained(folder)
    return pr.load(folder)


@pytest.mark.slow
def test_what_it_costs_is_known(inferred):
    sizes, shapes = inferred.architecture, cost.shapes(inferred.family, inferred.layout)
    latent = "kv_rank" in sizes
    values = sizes.kv_rank + sizes.rope_dim if latent else 2 * sizes.kv_heads * sizes.head_dim
    assert cost.kv_bytes_per_token(inferred.family, shapes, sizes) == 2 * sizes.layers * values
    assert min(memory.repair(inferred, sizes, blocks=1, block_size=64).values()) > 0
    assert all(
        limit.target > 0 for limit in parse_budget(inferred, memory="0.9x", kv_cache="0.9x", flops="0.9x").limits
    )


def test_a_type_without_a_file_is_cut_as_those_with_one(inferred, blocks, tmp_path):
    assert inferred.config.model_type not in known_families()
    student = cut_and_reload(inferred, drawn(inferred, 0), blocks, tmp_path)
    for model in (inferred.module(torch.float32), student):
        assert_cache_changes_nothing(model, blocks)


@pytest.mark.parametrize("model_type", ["biogpt", "gpt_neo", "opt"])
def test_a_model_may_know_more_positions_than_a_tiny_one(model_type, blocks, tmp_path):
    config = tiny(model_type)
    config.max_position_embeddings *= 2
    torch.manual_seed(0)
    random_model(config).save_pretrained(tmp_path / "whole")
    checkpoint = pr.load(tmp_path / "whole")
    cut_and_reload(checkpoint, checkpoint.architecture.replace(layers=2, ffn=24), blocks, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "masks"),
    [
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
        ("gpt2", ["transformer.h.0.attn.bias"]),
        ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"]),
        ("codegen", ["transformer.h.0.attn.causal_mask"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_masks_of_old_are_left_out(model_type, masks, dtype, tmp_path):
    """As published checkpoints such as Pythia's hold them."""
    torch.manual_seed(0)
    random_model(tiny(model_type)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {name: torch.ones(1, 1, 8, 8).to(dtype) for name in masks}, file, metadata={"format": "pt"})
    assert pr.load(tmp_path).stored.keys() == anatomy.stored_tensors(random_model(tiny(model_type))).keys()


def test_our_kernels_change_nothing(inferred, blocks):
    """Not even which tokens sparse attention looks at, which its code leaves to kernels that it does not know."""
    model = inferred.module(torch.float32)
    ours = logits(model, blocks)
    with hardware.plain([model]):
        torch.testing.assert_close(ours, logits(model, blocks), rtol=1e-3, atol=1e-4)


def test_keeping_everything_changes_no_bit(inferred, blocks, tmp_path):
    student = prune(
        inferred, score(measure(inferred, blocks)), inferred.architecture, to=tmp_path / "s", calibration=blocks
    )
    assert student.stored.keys() == inferred.stored.keys()
    assert torch.equal(logits(student.module(), blocks), logits(inferred.module(), blocks))
    assert inferred.parameters == sum(parameter.numel() for parameter in inferred.module().parameters())


AGREED = (
    *("arcee", "cohere2", "deepseek_v3", "falcon", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss"),
    *("granite", "llama", "mixtral", "olmo2", "phi3", "qwen2_moe", "starcoder2"),
)
"""Types with a file of which a tiny model shows all that the file says."""


@pytest.mark.parametrize("model_type", AGREED)
def test_what_is_inferred_is_what_the_file_says(model_type):
    config = AutoConfig.for_model(model_type)
    found, told = infer(config), family_of(model_type, config)
    for name in ("final_norm", "embedding", "head", "layer_prefix", "norm_offset", "centred", "transposed", "buffers"):
        assert getattr(found, name) == getattr(told, name), name
    assert found.scaled_embedding == told.scaled_embedding
    assert found.ignores_positions == told.ignores_positions
    assert found.uncut == {}
    expected = {branch.mark: branch for branch in told.branches if branch.mark in {b.mark for b in found.branches}}
    assert {branch.mark for branch in found.branches} == expected.keys()
    for branch in found.branches:
        there = expected[branch.mark]
        for name in ("module", "norm", "write", "post_norm", "experts", "beside", "write_gate"):
            assert getattr(branch, name) == getattr(there, name), name
        assert set(branch.reads) == set(there.reads)
    model = random_model(tiny(model_type))
    sizes = told.architecture(model.config)
    for name, value in anatomy.stored_tensors(model).items():
        mine, others = (family.units(name, value.shape) for family in (found, told))
        for axis in sizes.axes():
            assert [dims.owner(unit, sizes, axis).tolist() for unit in mine] == (
                [dims.owner(unit, sizes, axis).tolist() for unit in others]
            ), name


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "reads text in both directions"),
        ("mamba", "does not follow"),
        ("whisper", "does not follow|no module around it"),
        ("phimoe", "chooses by chance"),
        ("cohere2_moe", "is not the output of mlp.shared_experts.down_proj"),
    ],
)
def test_what_works_otherwise_is_refused_with_the_reason(model_type, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        infer(AutoConfig.for_model(model_type))


def test_the_head_gives_the_logits_of_the_model(inferred, blocks):
    """Also where a config multiplies by what others divide by."""
    model, (tokens, _) = inferred.module(torch.float32), blocks.batch([0])
    if hasattr(model.config, "logits_scaling"):
        model.config.logits_scaling = 4.0
    with torch.no_grad():
        states = anatomy.body_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
        expected = model(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(head_of(model).logits(states), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr("prunus.head.MULTIPLIED", ())
    config = AutoConfig.for_model("hyperclovax", logits_scaling=3.0)
    with pytest.raises(UnsupportedModel, match="its logits are not what its output head makes"):
        infer(config)


def test_what_cannot_be_cut_is_said(tmp_path):
    torch.manual_seed(0)
    random_model(tiny("olmo")).save_pretrained(tmp_path)
    model = pr.load(tmp_path)
    reasons = illegal_cut(model.family, model.architecture, model.architecture.replace(hidden=48))
    assert reasons[0] == "hidden of olmo cannot be cut: its norms have no weight to make up for channels that leave"
    found = legal_architectures(model.family, model.architecture, parse_budget(model, params="0.8x"))
    assert {architecture.hidden for architecture in found} == {model.architecture.hidden}
