"""A frozen model computes the same bits, and nothing but its projections was touched."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import KINDS, tiny_model
from transformers import PreTrainedModel

from prunus import hardware, layerwise
from prunus.checkpoint import Checkpoint
from prunus.frozen import Frozen, freeze, is_frozen

needs_bfloat16 = pytest.mark.skipif(
    hardware.compute_dtype() != torch.bfloat16 or hardware.device().type != "cpu",
    reason="only a CPU that multiplies bfloat16 gains from another layout",
)


@torch.no_grad()
def logits(model: PreTrainedModel, blocks: int, tokens: int) -> torch.Tensor:
    return model(torch.arange(blocks * tokens).view(blocks, tokens) % model.config.get_text_config().vocab_size).logits


@needs_bfloat16
@pytest.mark.parametrize("family", KINDS)
def test_same_bits_for_any_number_of_tokens(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path).module(torch.bfloat16)
    frozen = freeze(copy.deepcopy(model))
    head = model.get_output_embeddings()
    assert is_frozen(frozen) == any(type(each) is torch.nn.Linear and each is not head for each in model.modules())
    for shape in [(1, 1), (1, 7), (3, 30)]:
        assert torch.equal(logits(frozen, *shape), logits(model, *shape))


@needs_bfloat16
def test_head_and_sizes_stay(llama: Checkpoint) -> None:
    model = freeze(llama.module(torch.bfloat16))
    assert type(model.lm_head) is torch.nn.Linear
    assert sum(value.numel() for value in model.parameters()) == llama.parameters
    assert not any(value.requires_grad for value in model.parameters())


@needs_bfloat16
def test_is_not_compiled(llama: Checkpoint) -> None:
    model = freeze(llama.module(torch.bfloat16))
    expected = logits(model, 1, 8)
    layerwise.compile_layers(model)
    assert torch.equal(logits(model, 1, 8), expected)


def test_float32_stays_as_it_is(llama: Checkpoint) -> None:
    model = freeze(llama.module(torch.float32))
    assert not any(isinstance(module, Frozen) for module in model.modules())
    assert not any(value.requires_grad for value in model.parameters())
