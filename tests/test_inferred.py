"""Families that no file describes: what is inferred of a type is what its file says, where there is one; and a type that
has none is cut, saved and reloaded as those with one are."""

import pytest
import torch
from test_prune import cut_and_reload, drawn, logits
from transformers import AutoConfig

import prunus as pr
from prunus.checkpoint import Checkpoint
from prunus.families import _probes, known_families
from prunus.families._inferred import random_model
from prunus.importance import score
from prunus.measure import measure
from prunus.prune import prune

INFERRED = (
    *("afmoe", "apertus", "aria_text", "axk1", "bitnet", "cohere2_moe", "deepseek_v32", "flint", "glm4_moe_lite"),
    *("glm_moe_dsa", "gpt_neo", "granitemoe_swa", "hy_v3", "hyperclovax", "kolibri1", "nanochat", "olmo", "phimoe"),
    *("youtu",),
)


def tiny(model_type: str) -> object:
    config = AutoConfig.for_model(model_type)
    return _probes.tiny(config, {size: _probes.BASE[size] for size in _probes.fields_of(config)})


@pytest.fixture(scope="module", params=INFERRED)
def inferred(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    random_model(tiny(request.param)).save_pretrained(folder)
    return pr.load(folder)


@pytest.mark.parametrize("draw", range(3))
def test_a_type_without_a_file_is_cut_as_those_with_one(inferred, blocks, draw, tmp_path):
    assert inferred.config.model_type not in known_families()
    student = cut_and_reload(inferred, drawn(inferred, draw), blocks, tmp_path)
    prompt = blocks.batch([0])[0][:, :7]
    for model in (inferred.module(torch.float32), student):
        with_cache, without = (
            model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None)
            for use_cache in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_keeping_everything_changes_no_bit(inferred, blocks, tmp_path):
    student = prune(
        inferred, score(measure(inferred, blocks)), inferred.architecture, to=tmp_path / "s", calibration=blocks
    )
    assert student.stored.keys() == inferred.stored.keys()
    assert torch.equal(logits(student.module(), blocks), logits(inferred.module(), blocks))
    assert inferred.parameters == sum(parameter.numel() for parameter in inferred.module().parameters())
