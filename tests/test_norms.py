"""Our RMSNorm computes what transformers' does, for every family, and leaves alone what is none."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from prunus import hardware, norms
from prunus.families import family_of, known_families

KINDS = {"weight": LlamaRMSNorm, "1 + weight": Gemma3RMSNorm, "weight in float32": Olmo2RMSNorm}


def norm(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    module = kind(48, eps=1e-3).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(48))
    return module


def run(module: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Value, and gradients to input and weight."""
    x = x.detach().requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (x, module.weight))]


def as_ours(module: nn.Module) -> nn.Module:
    norms.install(nn.Sequential(module))
    assert isinstance(module, norms.Fast)
    return module


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_equals_transformers_in_value_and_gradient(kind: type[nn.Module]) -> None:
    module = norm(kind, torch.float32)
    # As one projection of several leaves its part of the channels: not contiguous.
    x, weights = torch.randn(2, 5, 3, 96)[..., 48:] * 3, torch.randn(2, 5, 3, 48)
    expected = run(module, x, weights)
    for got, wanted in zip(run(as_ours(module), x, weights), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_large_weights_do_not_hide_that_1_is_added() -> None:
    """Those of Gemma 3 270M reach 61: 1 more is then little beside them, but 1.6 % of every output."""
    module = norm(Gemma3RMSNorm, torch.bfloat16)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(60, 100, 48))
    x = torch.randn(20, 48).bfloat16()
    expected = module(x)
    torch.testing.assert_close(as_ours(module)(x), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_no_farther_from_float32_in_bfloat16(kind: type[nn.Module]) -> None:
    module = norm(kind, torch.bfloat16)
    x, weights = torch.randn(200, 48).bfloat16(), torch.randn(200, 48).bfloat16()
    plain, ours = run(module, x, weights), run(as_ours(module), x, weights)
    exact = run(module.float(), x.float(), weights.float())
    for got, theirs, wanted in zip(ours, plain, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).norm() < 1.1 * (theirs.float() - wanted).norm()


def test_a_frozen_weight_gets_no_gradient() -> None:
    module = as_ours(norm(LlamaRMSNorm, torch.float32)).requires_grad_(False)
    x = torch.randn(4, 48, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None


class AnotherRMSNorm(LlamaRMSNorm):
    """By its name one of them, but it adds the input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


@pytest.mark.parametrize("other", [AnotherRMSNorm(48), MambaRMSNormGated(48, 48), nn.LayerNorm(48)])
def test_others_are_left_alone(other: nn.Module) -> None:
    before = type(other)
    norms.install(nn.Sequential(other))
    assert type(other) is before


@pytest.mark.parametrize("family", known_families())
def test_every_norm_of_a_model_is_replaced_and_can_be_put_back(family: str, tmp_path: Path) -> None:
    if family_of(family).centred:
        pytest.skip("LayerNorm")
    model = tiny_model(family, tmp_path / "model").module()
    named = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    found = [module for module in named if dict(module.named_parameters())]
    assert len(found) > model.config.get_text_config().num_hidden_layers
    assert all(isinstance(module, norms.Fast) for module in found)
    tokens = torch.randint(0, 97, (1, 20))
    ours = model(input_ids=tokens).logits
    with hardware.plain([model]):
        assert not any(isinstance(module, norms.Fast) for module in found)
        plain = model(input_ids=tokens).logits
    assert all(isinstance(module, norms.Fast) for module in found)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
