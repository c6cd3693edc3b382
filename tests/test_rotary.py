"""Our rotary embeddings compute what transformers' do, and leave alone what is written otherwise."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from prunus import faster, hardware, rotary
from prunus.anatomy import layers_of
from prunus.families import known_families


def test_equals_transformers_in_value_and_gradient() -> None:
    # As a projection leaves them: heads and tokens swapped, not contiguous.
    inputs = [torch.randn(2, 5, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for heads in (4, 2)]
    tables = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    found, expected = (
        (apply(*inputs, *tables)) for apply in (rotary._like(apply_rotary_pos_emb), apply_rotary_pos_emb)
    )
    weights = [torch.randn_like(part) for part in expected]
    gradients = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(parts, weights, strict=True)), inputs)
        for parts in (found, expected)
    ]
    for got, wanted in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(got, wanted)


def test_only_halves_are_turned_so() -> None:
    assert rotary._of(LlamaAttention) is not None
    assert rotary._of(CohereAttention) is None  # turns pairs of neighbours


@pytest.mark.parametrize("family", known_families())
def test_a_model_computes_the_same_with_and_without(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "model").module(torch.float32)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (2, 9))
    installed = sum(isinstance(module, faster.Faster) for module in model.modules())
    ours = model(tokens).logits
    with hardware.plain([model]):
        assert not any(isinstance(module, faster.Faster) for module in model.modules())
        theirs = model(tokens).logits
    assert installed == sum(isinstance(module, faster.Faster) for module in model.modules())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_torch_compile_sees_the_plain_function(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model").module(torch.float32)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (2, 9))
    plain = model(tokens).logits
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-4, atol=1e-5)
