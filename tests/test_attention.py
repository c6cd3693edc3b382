"""Our attention computes what PyTorch's does, for every family, and leaves no trace in what is written."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import RandomBlocks, tiny_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from prunus import attention, hardware
from prunus.anatomy import body_of, layers_of
from prunus.attention import CHUNK_ROWS, attend
from prunus.families import family_of, known_families
from prunus.layerwise import branches_of

LENGTHS = (1, 7, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 30)
needs_bf16 = pytest.mark.skipif(torch.cuda.is_available(), reason="the models are placed on the GPU")


def heads(count: int, length: int, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """[2, count, length, width], laid out as a projection leaves it."""
    return torch.randn(2, length, count, width, dtype=dtype).transpose(1, 2).requires_grad_()


def documents(length: int) -> Tensor:
    """bool [2, 1, S, S]: documents of 50 tokens, the second sequence shifted by 20."""
    number_BS = (torch.arange(length) + torch.tensor([[0], [20]])) // 50
    same_BSS = number_BS[:, :, None] == number_BS[:, None, :]
    return (same_BSS & torch.ones(length, length).tril().bool())[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_pytorch_in_value_and_gradient(groups: int, length: int, masked: bool) -> None:
    torch.manual_seed(length)
    q, k, v = heads(6, length, 8), heads(groups, length, 8), heads(groups, length, 5)
    mask = documents(length) if masked else None
    weights = torch.randn(2, length, 6, 5, dtype=torch.float64)
    repeated = [x.repeat_interleave(6 // groups, dim=1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask, is_causal=not masked, scale=0.3)
    expected_grads = torch.autograd.grad((expected.transpose(1, 2) * weights).sum(), (q, k, v))
    result = attend(q, k, v, scale=0.3, mask=mask)
    grads = torch.autograd.grad((result * weights).sum(), (q, k, v))
    torch.testing.assert_close(result, expected.transpose(1, 2), rtol=1e-10, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@needs_bf16
@pytest.mark.parametrize("decoder", [{"model_type": "gemma2"}, {"model_type": "gpt_oss", "num_local_experts": 4}])
def test_a_decoder_that_attends_eagerly_does_so_behind_a_vision_tower(decoder: dict, tmp_path: Path) -> None:
    """Of the whole model transformers says "sdpa" all the same."""
    teacher = tiny_model("llava", tmp_path, **decoder)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert body_of(plain).config._attn_implementation == "eager"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected, found = (model(input_ids=tokens).logits for model in (plain, teacher.module(torch.float32)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradient_near_float64_in_bfloat16() -> None:
    torch.manual_seed(0)
    inputs = [heads(count, 300, 64, dtype=torch.bfloat16) for count in (6, 2, 2)]
    weights = torch.randn(2, 300, 6, 64)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    result, expected = (attend(*x, scale=0.125) for x in (inputs, exact))
    grads = torch.autograd.grad((result * weights.bfloat16()).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights.bfloat16().double()).sum(), exact)
    for got, wanted in zip((result, *grads), (expected, *expected_grads), strict=True):
        assert (got.double() - wanted).norm() < 0.01 * wanted.norm()


def test_row_without_keys_stays_finite() -> None:
    mask = documents(40)
    mask[0, :, 5] = False
    assert attend(heads(6, 40, 8), heads(2, 40, 8), heads(2, 40, 8), scale=1.0, mask=mask).isfinite().all()


OWN_ATTENTION = {"falcon"}
"""Types whose attention is not one that can be replaced."""


@needs_bf16
@pytest.mark.parametrize("family", known_families())
def test_models_compute_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, tmp_path / "model").module(torch.bfloat16)
    if model.config._attn_implementation == "eager" or family in OWN_ATTENTION | {"mamba2"}:
        pytest.skip("transformers has no PyTorch kernel for this family's attention")
    assert model.config._attn_implementation == attention.NAME
    calls = []
    monkeypatch.setattr(attention, "attend", lambda *args, **options: calls.append(1) or attend(*args, **options))
    tokens, positions = RandomBlocks(torch.randint(0, 97, (2, 60))).batch([0, 1])
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        ours = body_of(model)(**inputs).last_hidden_state.float()
        own = [branches_of(layer, family_of(model.config.model_type, model.config)) for layer in layers_of(model)]
        attends = sum(any(branch.inner == "heads" for branch in branches) for branches in own)
        assert len(calls) == attends
        with attention.uninstalled([model]):
            plain = body_of(model)(**inputs).last_hidden_state.float()
            assert len(calls) == attends
        exact = body_of(hardware.place(model, dtype=torch.float32))(**inputs).last_hidden_state
    # No farther from float32 than what bfloat16 costs anyway; of most tokens, as a router may send one elsewhere.
    assert (ours - exact).norm(dim=-1).median() < 1.5 * (plain - exact).norm(dim=-1).median()


@needs_bf16
def test_decoding_with_a_cache(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model").module(torch.bfloat16)
    prompt = torch.randint(0, 97, (1, 30))
    with torch.no_grad():
        first = model(input_ids=prompt[:, :20], use_cache=True)
        rest = model(input_ids=prompt[:, 20:], past_key_values=first.past_key_values).logits
        whole = model(input_ids=prompt, use_cache=False).logits[:, 20:]
    assert (rest - whole).float().norm() < 0.03 * whole.float().norm()


def test_leaves_no_trace_in_a_saved_config(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model").module()
    model.save_pretrained(tmp_path / "saved")
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))
