"""Scores by hand, and their invariances."""

import itertools

import pytest
import torch
from conftest import RandomBlocks, tiny_model, weights_of

from prunus.anatomy import layers_of
from prunus.checkpoint import load
from prunus.depth import KINDS, contiguous_by_task, with_depth
from prunus.errors import BadRecipe
from prunus.importance import AGGREGATIONS, TABLE, aggregate, score
from prunus.measure import Statistics, measure
from prunus.scores import load_scores, save_scores
from prunus.source import in_memory
from prunus.weight_norms import weight_norms


def test_aggregations_by_hand():
    """Two blocks whose reductions over tokens are 3 and 4 (mean), 1 and 2 (l2), 0 and 5 (var)."""
    per_block = torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, 5.0]])
    sums = torch.stack([per_block.sum(1), per_block.square().sum(1)], dim=1).view(3, 2, 1, 1)
    expected = {
        "mean:mean": 3.5, "l2:mean": 5.0, "var:mean": 0.25,
        "mean:l2": 1.5, "l2:l2": 5**0.5, "var:l2": 0.25,
        "mean:var": 2.5, "l2:var": 5.0, "var:var": 6.25,
    }  # fmt: skip
    assert set(expected) == set(AGGREGATIONS)
    for aggregation, value in expected.items():
        assert float(aggregate(sums, 2, aggregation)) == pytest.approx(value)


@pytest.fixture(scope="module")
def models(llama, tmp_path_factory):
    """One for each axis."""
    shared = tiny_model("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))
    latents = tiny_model("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))
    mamba = tiny_model("mamba2", tmp_path_factory.mktemp("mamba2"))
    own = dict.fromkeys(("mamba_heads", "mamba_head_dim", "state"), mamba)
    own["linear_heads"] = tiny_model("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))
    own |= {"experts": shared, "expert_ffn": shared, "shared_ffn": shared, "q_rank": latents, "kv_rank": latents}
    return {axis: own.get(axis, llama) for axis in TABLE}


_STATISTICS = {}


def statistics_of(teacher, blocks):
    if teacher.folder not in _STATISTICS:
        found = measure(teacher, blocks)
        for kind in KINDS:
            found = with_depth(kind, teacher, found, blocks)
        by_task = contiguous_by_task(in_memory(teacher.module()), lambda model: 0.5)
        found = found.with_sums({"contiguous_by_task": by_task})
        _STATISTICS[teacher.folder] = found
    return _STATISTICS[teacher.folder]


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, table in TABLE.items() for name in table])
def test_every_score_has_the_shape_of_its_axis(models, blocks, axis, name):
    sizes = models[axis].architecture
    shapes = {
        "layers": (sizes.layers,),
        "hidden": (sizes.hidden,),
        "expert_ffn": (sizes.layers, sizes.get("experts"), sizes.get("expert_ffn")),
    }
    scores = score(statistics_of(models[axis], blocks), **{axis: name})
    assert scores[axis].shape == shapes.get(axis, (sizes.layers, sizes[axis]))
    assert torch.isfinite(scores[axis]).all()
    assert scores[axis].abs().sum() > 0
    assert scores.provenance[f"score/{axis}"] == name
    assert scores.provenance["tokens"] == "144"
    assert scores.axes.keys() - {"layers", "hidden"} <= sizes.keys()


def test_scores_of_experts_by_hand():
    """Two experts: one sent two tokens (w‖y‖ 1 and 3), one sent none."""
    sums = {"output/experts": torch.tensor([[4.0, 0.0]]), "tokens/experts": torch.tensor([[2.0, 0.0]])}
    sums |= {"energy/expert_ffn": torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])}
    sums |= {"write/expert_ffn": torch.tensor([[[9.0, 1.0], [1.0, 1.0]]])}
    stats = Statistics({}, {}, sums, num_blocks=1, num_tokens=4)
    assert TABLE["experts"]["reap"](stats, "experts", "").tolist() == [[2.0, 0.0]]
    assert TABLE["experts"]["frequency"](stats, "experts", "").tolist() == [[0.5, 0.0]]
    assert TABLE["expert_ffn"]["output"](stats, "expert_ffn", "").tolist() == [[[6.0, 0.0], [0.0, 0.0]]]
    assert TABLE["expert_ffn"]["activation"](stats, "expert_ffn", "").tolist() == [[[2.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "olmo2"])
def test_a_channel_has_its_share_of_what_each_norm_hands_on(name, blocks, tmp_path):
    """Of what the norms put out, whatever the size of their weights; of the stream where it is read without one."""
    teacher = tiny_model(name, tmp_path)
    model, shares = teacher.module(), []
    read = {branch.norm for branch in teacher.family.branches if branch.norm}

    def see(x_BSC):
        squares_H = x_BSC.flatten(0, 1).double().square().sum(0)
        shares.append(squares_H / squares_H.sum())

    for layer in layers_of(model):
        for norm in read:
            layer.get_submodule(norm).register_forward_hook(lambda _, args, output: see(output))
        if not read:
            layer.register_forward_pre_hook(lambda _, args: see(args[0] / args[0].norm(dim=-1, keepdim=True)))
    model.get_submodule(teacher.family.final_norm).register_forward_hook(lambda _, args, output: see(output))
    tokens, positions = blocks.batch(list(range(len(blocks))))
    with torch.no_grad():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    found = score(measure(teacher, blocks, gradients=False))["hidden"]
    torch.testing.assert_close(found, torch.stack(shares).sum(0).float(), rtol=1e-3, atol=1e-5)
    assert float(found.sum()) == pytest.approx((len(read) or 1) * teacher.architecture.layers + 1, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_group_weighs_what_would_be_removed_with_it(name, tmp_path):
    """Its query heads too; where every head has its own keys and values, no weight is a group's alone."""
    teacher = tiny_model(name, tmp_path)
    found = weight_norms(teacher)["weight/kv_heads"]
    matrices = {name: units for name, units in teacher.layout.items() if len(units) == 2 and "head" in "".join(units)}
    whole = sum(tensor.square().sum() for name, tensor in weights_of(teacher).items() if name in matrices)
    torch.testing.assert_close(found.sum(), whole)
    assert found.min() > 0


def test_every_score_follows_a_permutation_of_the_neurons(llama, blocks, tmp_path):
    model = llama.module()
    order = torch.randperm(llama.architecture.ffn, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.copy_(projection.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    model.save_pretrained(tmp_path)
    permuted_teacher = load(tmp_path)
    for name in ("activation", "preactivation", "tempered_fisher", "fisher", "magnitude"):
        original = score(measure(llama, blocks), ffn=name)["ffn"]
        permuted = score(measure(permuted_teacher, blocks), ffn=name)["ffn"]
        torch.testing.assert_close(permuted, original[:, order], rtol=1e-3, atol=1e-4)


def test_scores_that_need_more_say_so(llama, blocks):
    plain = measure(llama, blocks, gradients=False)
    assert score(plain).provenance["score/ffn"] == "tempered_fisher, without gradients"
    assert score(plain).provenance["score/hidden"] == "norm_share"
    with pytest.raises(BadRecipe, match=r"measure.leave_one_out"):
        score(plain, ffn="activation", layers="leave_one_out")
    with pytest.raises(BadRecipe, match="activation"):
        score(plain, ffn="activatoin")


def test_scores_survive_the_disk(llama, blocks, tmp_path):
    scores = score(measure(llama, blocks))
    save_scores(scores, tmp_path / "scores.safetensors")
    loaded = load_scores(tmp_path / "scores.safetensors")
    assert all(torch.equal(loaded[axis], values) for axis, values in scores.axes.items())
    assert loaded.provenance == scores.provenance


def test_scores_do_not_depend_on_the_order_of_the_blocks(llama, blocks):
    reversed_blocks = RandomBlocks(blocks.tokens_NS.flip(0))
    for axis, aggregation in itertools.product(("ffn", "heads", "hidden"), ("l2:mean", "var:l2")):
        a, b = (
            score(measure(llama, part, gradients=False), aggregation=aggregation)[axis]
            for part in (blocks, reversed_blocks)
        )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
