"""Gradients at what branches write, against what the loss does when that is changed."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import for_each_kind

from prunus import sensitivity as module
from prunus.anatomy import layers_of
from prunus.importance import score
from prunus.layerwise import branches_of
from prunus.measure import measure
from prunus.sensitivity import sensitivity


@for_each_kind
def test_every_write_of_every_layer_has_one(teacher, blocks):
    model = teacher.module()
    sketches = sensitivity(model, teacher.family, blocks)
    places = [
        (number, branch.write)
        for number, layer in enumerate(layers_of(model))
        for branch in branches_of(layer, teacher.family)
        if branch.write
    ]
    assert sorted(sketches) == sorted(places)
    assert all(sketch.isfinite().all() and sketch.norm() > 0 for sketch in sketches.values())
    assert not any(each._forward_hooks for each in model.modules())


@pytest.mark.parametrize(("block_size", "count"), [(24, 2), (256, 2), (512, 2), (1024, 2), (1025, 1), (4096, 1)])
def test_long_blocks_go_backwards_one_at_a_time(block_size, count):
    """At the usual sizes two at a time, on which the labels that are drawn depend."""
    assert module.batch_blocks(block_size) == count


def test_no_more_goes_backwards_at_once(llama, blocks, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", blocks.tokens_NS.shape[1])
    backward, shapes = module._backward, []
    monkeypatch.setattr(
        module, "_backward", lambda model, *text: (shapes.append(text[0].shape), backward(model, *text))
    )
    sensitivity(llama.module(), llama.family, blocks)
    assert shapes == [(1, 24)] * len(blocks)


def test_it_predicts_what_an_error_costs(llama, blocks, monkeypatch):
    """½ E[(g·δ)²] against the divergence that noise on what one token of each block writes causes."""
    monkeypatch.setattr(module, "ROWS", 4096)
    model = llama.module()
    sketch = sensitivity(llama.module(), llama.family, blocks)[2, "mlp.down_proj"]
    tokens, positions = blocks.batch(list(range(len(blocks))))
    generator = torch.Generator().manual_seed(1)

    def logits(noise: float) -> torch.Tensor:
        down = layers_of(model)[2].get_submodule("mlp.down_proj")
        handle = down.register_forward_hook(lambda _, __, output: output + noise * delta)
        with torch.no_grad():
            found = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        handle.remove()
        return found

    predicted, measured = 0.0, 0.0
    for _ in range(24):
        delta = torch.zeros(*tokens.shape, llama.architecture.hidden)
        place = int(torch.randint(tokens.shape[1], (1,), generator=generator))
        delta[:, place] = torch.randn(len(tokens), llama.architecture.hidden, generator=generator)
        base, moved = (logits(noise).log_softmax(-1) for noise in (0.0, 0.05))
        measured += float(F.kl_div(moved, base, log_target=True, reduction="sum"))
        predicted += 0.5 * float((0.05 * delta[:, place] @ sketch.T).square().sum())
    assert measured == pytest.approx(predicted, rel=0.35)


def test_neurons_are_weighed_by_it(llama, blocks, monkeypatch):
    """Where the loss minds nothing but one channel, what is written there alone counts."""
    only = torch.zeros(1, llama.architecture.hidden)
    only[0, 3] = math.sqrt(2)
    sketches = {(layer, branch.write): only for layer in range(4) for branch in llama.family.branches}
    monkeypatch.setattr(sys.modules["prunus.measure"], "sensitivity", lambda *_: sketches)
    found, bare = (measure(llama, blocks, gradients=gradients) for gradients in (True, False))
    model = llama.module()
    seen: list[torch.Tensor] = []
    down = layers_of(model)[1].get_submodule("mlp.down_proj")
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    h_NF = torch.cat(seen)
    damage_F = (h_NF * down.weight[3]).square().sum(0)
    torch.testing.assert_close(found.sums["damage/ffn"][1], damage_F, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(bare.sums["damage/ffn"], found.sums["damage/ffn"])
    size_F = h_NF.square().mean(0).sqrt()
    torch.testing.assert_close(
        score(found)["ffn"][1], (size_F * (damage_F / len(h_NF)).sqrt()).sqrt(), rtol=1e-3, atol=0
    )
