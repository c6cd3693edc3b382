"""Statistics against direct computation, and what they must not depend on."""

import sys

import pytest
import torch
import torch.nn.functional as F

from prunus import hardware
from prunus.layerwise import gram
from prunus.measure import inverse_diagonal, leave_one_out, load_statistics, measure, save_statistics
from prunus.source import in_memory, on_disk, opened


def hidden_states(teacher, blocks):
    model = teacher.module()
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        return model.base_model(input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True)


def test_signals_are_what_the_layers_compute(teacher, blocks):
    stats = measure(teacher, blocks, grams=True)
    seen = {}
    model = teacher.module()
    for branch in teacher.family.branches:
        write = model.base_model.layers[2].get_submodule(branch.write)
        write.register_forward_pre_hook(lambda _, args, name=branch.name: seen.__setitem__(name, args[0]))
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    inner_BSF = seen["ffn"]
    mean, l2, var = (stats.reductions["activation"][i, 0, 2] for i in range(3))
    torch.testing.assert_close(mean, inner_BSF.abs().mean(1).sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(l2, inner_BSF.norm(dim=1).sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, inner_BSF.var(dim=1, correction=0).sum(0), rtol=1e-3, atol=1e-5)
    heads_BSA = seen["attention"].unflatten(-1, (-1, teacher.architecture.head_dim)).norm(dim=-1)
    torch.testing.assert_close(stats.reductions["head_output"][0, 0, 2], heads_BSA.mean(1).sum(0), rtol=1e-4, atol=1e-5)
    inner_NF = inner_BSF.flatten(0, 1)
    expected = inverse_diagonal(inner_NF.T @ inner_NF / len(inner_NF))
    torch.testing.assert_close(stats.inverse_gram["ffn"][2], expected, rtol=1e-3, atol=1e-4)


def test_block_influence_and_energy_by_hand(llama, blocks):
    states = hidden_states(llama, blocks).hidden_states
    stats = measure(llama, blocks)
    cosine = F.cosine_similarity(states[1], states[2], dim=-1).sum()
    torch.testing.assert_close(stats.sums["cosine"][1], cosine, rtol=1e-4, atol=1e-4)
    x_NH = states[1].flatten(0, 1)
    energy = (x_NH / x_NH.square().mean(1, keepdim=True).sqrt()).square().sum(0)
    torch.testing.assert_close(stats.energies["input_layernorm"][1], energy, rtol=1e-4, atol=1e-4)
    assert stats.num_tokens == len(x_NH)


def test_statistics_do_not_depend_on_the_batch_split(teacher, blocks, monkeypatch):
    together = measure(teacher, blocks)
    monkeypatch.setattr(sys.modules["prunus.measure"], "BATCH_BLOCKS", 1)
    apart = measure(teacher, blocks)
    for name, value in together.reductions.items():
        torch.testing.assert_close(apart.reductions[name], value, rtol=1e-3, atol=1e-4)
    for name, value in together.energies.items():
        torch.testing.assert_close(apart.energies[name], value, rtol=1e-3, atol=1e-4)


def test_measuring_leaves_the_model_as_it_was(llama, blocks):
    model = llama.module()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(llama, blocks, source=in_memory(model))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_survive_the_disk(llama, blocks, tmp_path):
    stats = measure(llama, blocks, grams=True)
    save_statistics(stats, tmp_path / "stats.safetensors")
    loaded = load_statistics(tmp_path / "stats.safetensors")
    assert loaded.provenance == stats.provenance
    assert torch.equal(loaded.reductions["activation"], stats.reductions["activation"])
    assert torch.equal(loaded.inverse_gram["ffn"], stats.inverse_gram["ffn"])


def test_leave_one_out_equals_running_the_model_without_each_layer(teacher, blocks):
    whole, losses = leave_one_out(teacher, blocks)
    tokens, positions = blocks.batch(list(range(len(blocks))))
    mask = positions[:, 1:] == positions[:, :-1] + 1

    def naive(removed: int | None) -> float:
        model = teacher.module()
        layers = model.base_model.layers
        if removed is not None:
            layers[removed].forward = lambda hidden_states, **_: hidden_states
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, :-1][mask]
        return float(F.cross_entropy(logits, tokens[:, 1:][mask]))

    assert whole == pytest.approx(naive(None), rel=1e-5)
    for layer, loss in enumerate(losses):
        assert float(loss) == pytest.approx(naive(layer), rel=1e-4)


def test_gram_is_exact_in_both_types():
    x = torch.randn(50, 37)
    torch.testing.assert_close(gram(x), x.T @ x)
    rounded = x.bfloat16()
    exact = rounded.double().T @ rounded.double()
    assert (gram(rounded).double() - exact).norm() / exact.norm() < 1e-4


def test_layer_by_layer_from_disk_is_the_same(teacher, blocks):
    source = on_disk(teacher)
    found, expected = measure(teacher, blocks, source=source), measure(teacher, blocks)
    for group in ("reductions", "energies", "sums", "inverse_gram"):
        assert getattr(found, group).keys() == getattr(expected, group).keys()
        for name, value in getattr(expected, group).items():
            assert torch.equal(getattr(found, group)[name], value), name
    losses = [leave_one_out(teacher, blocks, source=each) for each in (source, None)]
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    assert all(weight.is_meta for weight in source.model.parameters())


def test_a_model_larger_than_memory_is_read_layer_by_layer(llama, monkeypatch):
    assert not any(weight.is_meta for weight in opened(llama).model.parameters())
    monkeypatch.setattr(hardware, "free_memory", lambda: llama.bytes)
    assert all(weight.is_meta for weight in opened(llama).model.parameters())
