"""Methods that take whole layers away. They keep the least number of layers that has the parameters asked for."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor
from transformers import PreTrainedModel

import prunus as pr
from prunus import anatomy, evaluate, hardware
from prunus.text import Blocks

from .bench import Bench, batches


def shortgpt(bench: Bench) -> PreTrainedModel:
    """The layers that change their input's direction least. Source: arXiv:2403.03853."""
    scores = pr.score(bench.statistics, layers="block_influence")
    return bench.sliced(bench.teacher.architecture.replace(layers=bench.layers()), scores)


def contiguous(bench: Bench) -> PreTrainedModel:
    """The run of neighbouring layers without which the loss on other text is lowest.

    Source: the depth-pruned model of Minitron in practice, arXiv:2408.11796, sec. 2; the last layer always stays.
    """
    layers, judge = bench.teacher.architecture.layers, bench.teacher.module(hardware.compute_dtype(), hardware.device())
    gone = layers - bench.layers()
    best = min(range(1, layers - gone), key=lambda start: _loss_without(judge, bench.validation, start, start + gone))
    return without(bench.model(), range(best, best + gone))


def laco(bench: Bench) -> PreTrainedModel:
    """Layers collapsed into the one before them, from the top, wherever the output stays near enough.

    A merge is kept if the cosine of the last hidden states with the teacher's stays above a threshold, the highest that
    leads to the layers asked for. Source: LaCo, arXiv:2402.11187, with its C = 4 layers at once and I = 2 layers
    between merges, as its authors' code runs (github.com/yangyifei729/LaCo).
    """
    few, target = bench.calibration.head(2), bench.layers()
    wanted = _states(bench.model(), few)

    def collapsed(step: int) -> PreTrainedModel:
        return _collapsed(bench.model(), wanted, few, threshold=1 - step / 40, target=target)

    return collapsed(bisect_left(range(40), True, key=lambda step: len(anatomy.layers_of(collapsed(step))) <= target))


def _collapsed(model: PreTrainedModel, wanted: Tensor, few: Blocks, threshold: float, target: int) -> PreTrainedModel:
    merged, apart = 4, 2
    place = len(anatomy.layers_of(model)) - merged
    while place >= 0 and (count := len(anatomy.layers_of(model))) > target:
        size = min(merged - 1, count - 1 - place, count - target)
        before = list(anatomy.layers_of(model))
        own = {name: value.clone() for name, value in before[place].state_dict().items()}
        if size > 0:
            layer = _collapsed_layer(before[place], before[place + size])
            _set_layers(model, [*before[:place], layer, *before[place + 1 + size :]])
            near = torch.nn.functional.cosine_similarity(_states(model, few), wanted, dim=-1).mean()
            if near > threshold:
                place = min(place - apart, len(anatomy.layers_of(model)) - merged)
                continue
            before[place].load_state_dict(own)
            _set_layers(model, before)
        place -= 1
    return model


@torch.no_grad()
def _collapsed_layer(layer: torch.nn.Module, last: torch.nn.Module) -> torch.nn.Module:
    """The first layer of a run, its projections those of the last; its norms stay.

    The paper writes the sum θ_l + Σ_k (θ_{l+k} − θ_l). Its authors' code takes it in place: each difference is from
    what the one before it left, and the last layer remains. The sum itself leaves SmolLM2 a perplexity of 2e9.
    That code knows no norms of queries, keys and outputs; where there are any, as in Gemma 3, the last layer stays as a
    whole, because its projections are nothing without them.
    """
    if any(name.startswith("post_feedforward") or name.endswith("q_norm") for name, _ in layer.named_modules()):
        return last
    for name, part in layer.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.load_state_dict(last.get_submodule(name).state_dict())
    return layer


def without(model: PreTrainedModel, gone: range) -> PreTrainedModel:
    """The model itself, these layers removed."""
    layers = list(anatomy.layers_of(model))
    _set_layers(model, [layer for number, layer in enumerate(layers) if number not in gone])
    return model


def _loss_without(model: PreTrainedModel, blocks: Blocks, start: int, stop: int) -> float:
    layers = list(anatomy.layers_of(model))
    _set_layers(model, layers[:start] + layers[stop:])
    try:
        return evaluate.quality(model, blocks).loss
    finally:
        _set_layers(model, layers)


def _set_layers(model: PreTrainedModel, layers: list[torch.nn.Module]) -> None:
    """These instead of the model's layers, with their numbers in the cache and their kinds of mask."""
    config = model.config
    if kinds := getattr(config, "layer_types", None):
        for layer, kind in zip(anatomy.layers_of(model), kinds, strict=True):
            layer.kind = kind
        config.layer_types = [layer.kind for layer in layers]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    anatomy.body_of(model).layers = torch.nn.ModuleList(layers)
    config.num_hidden_layers = len(layers)


@torch.no_grad()
def _states(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    """Behind the last norm, [N, H]."""
    body = anatomy.body_of(model)
    return torch.cat(
        [
            body(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).last_hidden_state.flatten(0, 1)
            for tokens_BS, positions_BS in batches(blocks)
        ]
    )
