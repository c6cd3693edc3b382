"""Statistics against direct computation, and what they must not depend on."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import for_each_kind, tiny_model

from prunus import experts, hardware
from prunus.anatomy import layers_of, stored_tensors
from prunus.depth import contiguous, contiguous_by_task, iterative, leave_one_out, logit_mse
from prunus.errors import BadCheckpoint, BadRecipe
from prunus.layerwise import Returned, branches_of, gram, has, weight_of
from prunus.measure import load_statistics, measure, save_statistics
from prunus.source import filling, hollow, in_memory, on_disk, opened
from prunus.weight_norms import HEADS


def hidden_states(teacher, blocks):
    model = teacher.module()
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        return model.base_model(input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True)


def observed_inputs(teacher, blocks, layer, names):
    """What modules of a layer read, by name."""
    seen, model = {}, teacher.module()
    for name in names:
        module = layers_of(model)[layer].get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args))
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    return seen, layers_of(model)[layer]


@for_each_kind
@pytest.mark.parametrize("layer", [1, 2])
def test_signals_are_what_the_layers_compute(teacher, blocks, layer):
    stats = measure(teacher, blocks, gradients=False)
    branches = branches_of(layers_of(teacher.module())[layer], teacher.family)
    writes = {branch.write: branch.inner for branch in branches if branch.write}
    seen, _ = observed_inputs(teacher, blocks, layer, writes)
    for write, axis in writes.items():
        inner_BSF = seen[write][0].view(len(blocks), blocks.tokens_NS.shape[1], -1)
        weight_OF = weight_of(layers_of(teacher.module())[layer].get_submodule(write)).float()
        for part in {axis, "kv_heads"} & teacher.architecture.keys() if axis == "heads" else {axis} - set(HEADS):
            parts_PND = inner_BSF.flatten(0, 1).float().chunk(teacher.architecture[part], dim=1)
            weights_POD = weight_OF.chunk(teacher.architecture[part], dim=1)
            written = [(x_ND @ w_OD.T).square().sum() for x_ND, w_OD in zip(parts_PND, weights_POD, strict=True)]
            for name in ("written", "damage"):  # the same without gradients
                found = stats.sums[f"{name}/{part}"][layer]
                torch.testing.assert_close(found, torch.stack(written), rtol=1e-3, atol=1e-5)
        if axis in HEADS:
            heads_BSA = inner_BSF.unflatten(-1, (teacher.architecture[axis], -1)).norm(dim=-1)
            found = stats.reductions[f"output/{axis}"][0, 0, layer]
            torch.testing.assert_close(found, heads_BSA.mean(1).sum(0), rtol=1e-4, atol=1e-5)
            continue
        mean, l2, var = (stats.reductions[f"activation/{axis}"][i, 0, layer] for i in range(3))
        torch.testing.assert_close(mean, inner_BSF.abs().mean(1).sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(l2, inner_BSF.norm(dim=1).sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var, inner_BSF.var(dim=1, correction=0).sum(0), rtol=1e-3, atol=1e-5)


@for_each_kind
def test_experts_are_seen_one_by_one(teacher, blocks):
    """Against the experts' own module, called with one expert alone."""
    branch = next((branch for branch in teacher.family.branches if branch.experts), None)
    if branch is None:
        pytest.skip(f"{teacher.family.model_type} has no experts")
    stats = measure(teacher, blocks)
    number = next(n for n, layer in enumerate(layers_of(teacher.module())) if has(layer, branch.experts))
    seen, layer = observed_inputs(teacher, blocks, number, [branch.experts])
    states, chosen, weights = seen[branch.experts]
    module, sizes = layer.get_submodule(branch.experts), teacher.architecture
    with torch.no_grad():
        for expert in range(sizes.experts):
            sent = (chosen == expert).any(1)
            alone = torch.where(chosen == expert, weights, 0)
            output = module(states, chosen, alone.to(weights.dtype))
            assert int(stats.sums["tokens/experts"][number, expert]) == int(sent.sum())
            torch.testing.assert_close(
                stats.sums["output/experts"][number, expert], output.norm(dim=1).sum(), rtol=1e-4, atol=1e-4
            )
            inner = experts.inner(module, expert, states[sent]) * alone.sum(1)[sent, None]
            torch.testing.assert_close(
                stats.sums["energy/expert_ffn"][number, expert], inner.square().sum(0), rtol=1e-4, atol=1e-4
            )
        whole = experts.run(module, states, chosen, weights, lambda routed: None)
        torch.testing.assert_close(whole, module(states, chosen, weights), rtol=1e-4, atol=1e-5)
    assert stats.sums["tokens/experts"][number].sum() == chosen.numel()


def test_block_influence_and_energy_by_hand(llama, blocks):
    states = hidden_states(llama, blocks).hidden_states
    stats = measure(llama, blocks)
    cosine = F.cosine_similarity(states[1], states[2], dim=-1).sum()
    torch.testing.assert_close(stats.sums["cosine"][1], cosine, rtol=1e-4, atol=1e-4)
    x_NH = states[1].flatten(0, 1)
    energy = (x_NH / x_NH.square().mean(1, keepdim=True).sqrt()).square().sum(0)
    torch.testing.assert_close(stats.energies["input_layernorm"][1], energy, rtol=1e-4, atol=1e-4)
    assert stats.num_tokens == len(x_NH)


def test_a_layer_that_changes_little_is_told_from_one_that_changes_nothing_in_bfloat16(llama, blocks):
    model, streams = llama.module(torch.bfloat16), []
    with torch.no_grad():
        for layer in layers_of(model):
            layer.mlp.down_proj.weight.mul_(0.02)
            layer.self_attn.o_proj.weight.mul_(0.02)
    found = measure(llama, blocks, source=in_memory(model), gradients=False).sums["cosine"]
    layers_of(model)[1].register_forward_hook(lambda _, args, output: streams.extend((args[0], output)))
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    before, after = (stream.double() for stream in streams)
    lost = 1 - F.cosine_similarity(before, after, dim=-1).mean()
    assert float(1 - found[1] / tokens.numel()) == pytest.approx(float(lost), rel=0.01)


@for_each_kind
def test_statistics_do_not_depend_on_the_batch_split(teacher, blocks, monkeypatch):
    together = measure(teacher, blocks)
    monkeypatch.setattr(sys.modules["prunus.measure"], "BATCH_BLOCKS", 1)
    apart = measure(teacher, blocks)
    for name, value in together.reductions.items():
        torch.testing.assert_close(apart.reductions[name], value, rtol=1e-3, atol=1e-4)
    for name, value in together.energies.items():
        torch.testing.assert_close(apart.energies[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("gradients", "what"), [(True, "the model"), (False, "layer 1 of the model")])
def test_a_model_that_overflows_is_refused(llama, blocks, gradients, what):
    model = llama.module(torch.float16)
    with torch.no_grad():
        layers_of(model)[1].mlp.down_proj.weight.mul_(3e4)
    with pytest.raises(BadCheckpoint, match=f"what {what} computes on this text is NaN or infinite.*bfloat16"):
        measure(llama, blocks, source=in_memory(model), gradients=gradients)


def test_measuring_leaves_the_model_as_it_was(llama, blocks):
    model = llama.module()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(llama, blocks, source=in_memory(model))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_survive_the_disk(llama, blocks, tmp_path):
    stats = measure(llama, blocks)
    save_statistics(stats, tmp_path / "stats.safetensors")
    loaded = load_statistics(tmp_path / "stats.safetensors")
    assert loaded.provenance == stats.provenance
    assert torch.equal(loaded.reductions["activation/ffn"], stats.reductions["activation/ffn"])
    assert torch.equal(loaded.sums["damage/ffn"], stats.sums["damage/ffn"])


@for_each_kind
def test_leave_one_out_equals_running_the_model_without_each_layer(teacher, blocks):
    whole, losses = leave_one_out(teacher, blocks)
    tokens, positions = blocks.batch(list(range(len(blocks))))
    mask = positions[:, 1:] == positions[:, :-1] + 1

    def naive(removed: int | None) -> float:
        model = teacher.module()
        layers = layers_of(model)
        if removed is not None:
            layers[removed].forward = lambda hidden_states, *_, **__: hidden_states.as_subclass(Returned)
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, :-1][mask]
        return float(F.cross_entropy(logits, tokens[:, 1:][mask]))

    assert whole == pytest.approx(naive(None), rel=1e-5)
    for layer, loss in enumerate(losses):
        assert float(loss) == pytest.approx(naive(layer), rel=1e-4)


def test_a_streamed_model_loses_layers_over_as_many_blocks_as_fit(llama, blocks, monkeypatch):
    """Where one block fits, each goes alone; both ways with the figures of all at once."""
    whole, losses = leave_one_out(llama, blocks, source=on_disk(llama))
    monkeypatch.setattr(hardware, "free_memory", lambda: 0)
    done = []
    again, alone = leave_one_out(
        llama, blocks, source=on_disk(llama), progress=lambda layers, total: done.append((layers, total))
    )
    assert again == pytest.approx(whole, rel=1e-6)
    assert torch.allclose(alone, losses, rtol=1e-6)
    assert len(done) == len(blocks) * llama.architecture.layers
    assert done == sorted(done)
    assert done[-1] == (4, 4)


def test_without_layers_that_are_gone_it_is_a_smaller_model(llama, blocks):
    whole, losses = leave_one_out(llama, blocks)
    again, fewer = leave_one_out(llama, blocks, without=[1])
    assert again == pytest.approx(float(losses[1]), rel=1e-6)
    assert fewer.isnan().tolist() == [False, True, False, False]
    assert whole not in (again, *fewer.tolist())


def test_layers_leave_in_the_order_of_what_each_costs_then(llama, blocks):
    rises = iterative(llama, blocks)
    whole, losses = leave_one_out(llama, blocks)
    first = int(losses.argmin())
    _, second_losses = leave_one_out(llama, blocks, without=[first])
    second = int(second_losses.nan_to_num(float("inf")).argmin())
    order = rises.argsort().tolist()
    assert order[:2] == [first, second]
    assert len(set(rises.tolist())) == len(rises)
    assert float(rises[first]) == pytest.approx(max(float(losses[first]) - whole, 1e-6), rel=1e-3)


def test_neighbours_leave_as_one_run(blocks, tmp_path):
    deep = tiny_model("llama", tmp_path, num_hidden_layers=8)
    order = contiguous(deep, blocks).argsort().tolist()
    _, alone = leave_one_out(deep, blocks)
    assert order[0] == 1 + int(alone[1:-1].argmin())
    gone = [order[0]]
    for layer in order[1:4]:
        ends = [end for end in (min(gone) - 1, max(gone) + 1) if 0 < end < 7]
        _, losses = leave_one_out(deep, blocks, without=gone)
        assert layer == min(ends, key=lambda end: float(losses[end]))
        gone.append(layer)
    apart = [min(abs(layer - other) for other in gone) for layer in order[4:]]
    assert apart == sorted(apart)


def test_neighbours_leave_by_what_a_task_says(blocks, tmp_path):
    deep, asked = tiny_model("llama", tmp_path, num_hidden_layers=8), []

    def errors(model):
        tokens, positions = blocks.batch(list(range(len(blocks))))
        mask = positions[:, 1:] == positions[:, :-1] + 1
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, :-1][mask]
        asked.append(float(F.cross_entropy(logits, tokens[:, 1:][mask])))
        return asked[-1]

    source = in_memory(deep.module())
    torch.testing.assert_close(contiguous_by_task(source, errors), contiguous(deep, blocks), rtol=1e-3, atol=1e-5)
    assert len(asked) == len(set(asked)) <= 1 + 6 + 3 * 2, "nothing is asked for twice"
    assert errors(source.model) == asked[6], "all layers are back"
    with pytest.raises(BadRecipe, match="a task needs the whole model"):
        contiguous_by_task(on_disk(deep), errors)


def test_only_the_layers_that_are_asked_for_are_tried(llama, blocks):
    _, losses = leave_one_out(llama, blocks)
    _, some = leave_one_out(llama, blocks, only=[1, 3])
    assert some.isnan().tolist() == [True, False, True, False]
    torch.testing.assert_close(some[[1, 3]], losses[[1, 3]])


def test_the_change_of_the_logits_without_a_layer(llama, blocks):
    model, tokens, positions = llama.module(), *blocks.batch(list(range(len(blocks))))
    mask = positions[:, 1:] == positions[:, :-1] + 1
    with torch.no_grad():
        whole = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        layers_of(model)[2].forward = lambda hidden_states, *_, **__: hidden_states
        other = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    expected = (whole - other)[:, :-1][mask].square().mean()
    assert float(logit_mse(llama, blocks)[2]) == pytest.approx(float(expected), rel=1e-4)


def test_gram_is_exact_in_both_types():
    x = torch.randn(50, 37)
    torch.testing.assert_close(gram(x), x.T @ x)
    rounded = x.bfloat16()
    exact = rounded.double().T @ rounded.double()
    assert (gram(rounded).double() - exact).norm() / exact.norm() < 1e-4


@for_each_kind
def test_layer_by_layer_from_disk_is_the_same(teacher, blocks):
    source = on_disk(teacher)
    found, expected = measure(teacher, blocks, source=source), measure(teacher, blocks, gradients=False)
    for group in ("reductions", "energies", "sums"):
        assert getattr(found, group).keys() == getattr(expected, group).keys()
        for name, value in getattr(expected, group).items():
            assert torch.equal(getattr(found, group)[name], value), name
    losses = [leave_one_out(teacher, blocks, source=each) for each in (source, None)]
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    assert all(weight.is_meta for weight in source.model.parameters())


@for_each_kind
def test_a_hollow_model_that_is_filled_is_the_whole_one(teacher):
    model, expected = hollow(teacher, torch.float32), teacher.module(torch.float32).state_dict()
    fill = filling(model, teacher, torch.float32)
    for name in stored_tensors(model):
        fill([name])
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_model_larger_than_memory_is_read_layer_by_layer(llama, monkeypatch):
    assert not any(weight.is_meta for weight in opened(llama).model.parameters())
    monkeypatch.setattr(hardware, "free_memory", lambda: llama.bytes)
    assert all(weight.is_meta for weight in opened(llama).model.parameters())
