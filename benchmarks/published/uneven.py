"""Methods that give every layer a width of its own, which no plain checkpoint can say: they live in memory alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy

from .bench import READS, WRITE, Bench, batches, count, keep_groups, keep_neurons, moments, weights

UNTOUCHED = (4, 2)
"""First and last layers that LLM-Pruner leaves as they are, of the 32 of its examples: 4 and 2."""


@torch.no_grad()
def flap(bench: Bench) -> PreTrainedModel:
    """Variance of a channel's input × ‖W‖², standardised in each layer and ranked over all; what leaves is replaced by
    its mean, as a bias. Source: FLAP, arXiv:2312.11983 (WIFV, AL-AM)."""
    model, sizes = bench.model(), bench.teacher.architecture
    means, scores = {}, {}
    for name, (mean_LI, square_LI) in moments(bench).items():
        fluctuation_LI = square_LI - mean_LI.square()
        means[name], scores[name] = mean_LI, _standard(fluctuation_LI * weights(model, name).square().sum(1))
    groups_LG = scores["self_attn.o_proj"].unflatten(-1, (sizes.kv_heads, -1)).mean(-1)
    neurons_LF = scores["mlp.down_proj"]
    costs = {"groups": _group_cost(bench), "neurons": 3 * sizes.hidden}
    keep_groups_LG, keep_neurons_LF = _above(bench, groups_LG, neurons_LF, costs)
    per_group = sizes.heads // sizes.kv_heads
    for number, layer in enumerate(anatomy.layers_of(model)):
        groups_C = keep_groups_LG[number].repeat_interleave(per_group * sizes.head_dim)
        for name, kept_I in (("mlp.down_proj", keep_neurons_LF[number]), ("self_attn.o_proj", groups_C)):
            linear = layer.get_submodule(name)
            gone_I = means[name][number] * ~kept_I
            linear.bias = nn.Parameter(linear.weight @ gone_I)
        keep_neurons(layer, keep_neurons_LF[number].nonzero()[:, 0].tolist())
        kept = keep_groups_LG[number].nonzero()[:, 0].tolist()
        keep_groups(layer, kept, per_group=per_group, head_dim=sizes.head_dim)
    return model


def _standard(x_LI: Tensor) -> Tensor:
    return (x_LI - x_LI.mean(1, keepdim=True)) / x_LI.std(1, keepdim=True)


def _group_cost(bench: Bench) -> int:
    """Parameters of a key-value group with its query heads."""
    sizes = bench.teacher.architecture
    return 2 * sizes.hidden * sizes.head_dim * (1 + sizes.heads // sizes.kv_heads)


def _above(bench: Bench, groups_LG: Tensor, neurons_LF: Tensor, costs: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Which stay when the lowest of all leave until the parameters are met; of each layer one at least."""
    values = torch.cat([groups_LG.flatten(), neurons_LF.flatten()])
    weight = torch.cat([torch.full_like(groups_LG, costs["groups"]), torch.full_like(neurons_LF, costs["neurons"])], 1)
    weight = torch.cat([part.flatten() for part in weight.split([groups_LG.shape[1], neurons_LF.shape[1]], 1)])
    best = torch.cat(
        [(table == table.amax(1, keepdim=True)).flatten() for table in (groups_LG, neurons_LF)]
    )  # these stay
    order = values.masked_fill(best, torch.inf).argsort()
    leaving = weight[order].cumsum(0) <= bench.teacher.parameters - bench.parameters
    kept = torch.ones_like(best)
    kept[order[leaving]] = False
    groups, neurons = kept.split([groups_LG.numel(), neurons_LF.numel()])
    return groups.view_as(groups_LG), neurons.view_as(neurons_LF)


def llm_pruner(bench: Bench) -> PreTrainedModel:
    """Σ |w ∂L/∂w| over each neuron and each key-value group, the same share of all layers but the first and last ones.

    Source: LLM-Pruner, arXiv:2305.11627 (element-wise, first order), with the loss of the text itself.
    """
    model, sizes = bench.model().requires_grad_(True), bench.teacher.architecture
    layers = list(anatomy.layers_of(model))
    first, last = (round(part * len(layers) / 32) for part in UNTOUCHED)
    middle = layers[first : len(layers) - last]
    _add_gradients(model, bench)
    too_many = (bench.teacher.parameters - bench.parameters) / len(middle)
    share = 1 - too_many / count(middle[0])
    groups = max(1, round(share * sizes.kv_heads))
    left = too_many - (sizes.kv_heads - groups) * _group_cost(bench)
    neurons = max(1, round(sizes.ffn - left / (3 * sizes.hidden)))
    for layer in middle:
        mlp, attention = layer.get_submodule("mlp"), layer.get_submodule("self_attn")
        neurons_F = sum(_taylor(mlp.get_submodule(name), 1) for name in READS) + _taylor(mlp.get_submodule(WRITE), 0)
        heads_C = sum(
            _taylor(attention.get_submodule(name), 1).unflatten(0, (sizes.kv_heads, -1)).sum(1)
            for name in ("q_proj", "k_proj", "v_proj")
        ) + _taylor(attention.get_submodule("o_proj"), 0).unflatten(0, (sizes.kv_heads, -1)).sum(1)
        keep_neurons(layer, neurons_F.topk(neurons).indices.sort().values.tolist())
        kept = heads_C.topk(groups).indices.sort().values.tolist()
        keep_groups(layer, kept, per_group=sizes.heads // sizes.kv_heads, head_dim=sizes.head_dim)
    model.zero_grad(set_to_none=True)
    return model


def _add_gradients(model: PreTrainedModel, bench: Bench) -> None:
    for tokens_BS, positions_BS in batches(bench.calibration.head(16)):
        model(input_ids=tokens_BS, position_ids=positions_BS, labels=tokens_BS, use_cache=False).loss.backward()


def _taylor(linear: nn.Module, dim: int) -> Tensor:
    """Σ |w g| over this dimension of the weight."""
    return (linear.weight * linear.weight.grad).abs().sum(dim).detach()
