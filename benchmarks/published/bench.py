"""What every method of the laboratory is given, and how a model in memory is narrowed, each layer for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import prunus as pr
from prunus import anatomy, hardware
from prunus.prune import build, cut
from prunus.text import Blocks

BATCH_BLOCKS = 4
READS, WRITE = ("gate_proj", "up_proj"), "down_proj"
WRITERS = ("mlp.down_proj", "self_attn.o_proj")
"""What writes the residual stream, from neurons and from heads."""


class Inapplicable(Exception):
    """The method says nothing of such a model."""


@dataclass(frozen=True)
class Bench:
    """One size of the laboratory.

    Attributes:
        calibration: text that scores and fits are made from; not trained or judged on.
        validation: text that a method may choose by.
        parameters: what a student may have, a tied head counted once.
        shape: what Prunus found for that size; the methods that only say which parts leave are given it.
        statistics: of the teacher on the calibration text.
    """

    teacher: pr.Checkpoint
    calibration: Blocks
    validation: Blocks
    parameters: int
    shape: pr.Architecture
    statistics: pr.Statistics

    def model(self) -> PreTrainedModel:
        """A fresh copy of the teacher, float32."""
        return self.teacher.module(torch.float32, hardware.device())

    def sliced(self, architecture: pr.Architecture, scores: pr.Scores, **options: bool) -> PreTrainedModel:
        """The teacher's weights as they are, cut by these scores."""
        return build(cut(self.teacher, scores, architecture, **options), torch.float32)

    def layers(self) -> int:
        """The least number of layers with the parameters asked for: a method of depth may keep a little more."""
        kept, per_layer = self.teacher.architecture.layers, count(anatomy.layers_of(self.model())[0])
        while self.teacher.parameters - per_layer * (self.teacher.architecture.layers - kept + 1) >= self.parameters:
            kept -= 1
        return kept


def count(module: nn.Module) -> int:
    """Parameters, a shared one once."""
    return sum(value.numel() for value in module.parameters())


def batches(blocks: Blocks) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and positions, some blocks at a time."""
    for start in range(0, len(blocks), BATCH_BLOCKS):
        yield blocks.batch(range(start, min(start + BATCH_BLOCKS, len(blocks))))


@contextmanager
def seen(model: PreTrainedModel, module: str, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, `see(layer, input)` is called whenever a module of this name of a layer has been given something."""
    handles = [
        layer.get_submodule(module).register_forward_pre_hook(
            lambda _, args, number=number: see(number, args[0].detach())
        )
        for number, layer in enumerate(anatomy.layers_of(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def moments(bench: Bench) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and mean square over the calibration text of each channel that the writers of each layer are given.

    Returns:
        module → ([L, C], [L, C]).
    """
    model = bench.teacher.module(hardware.compute_dtype(), hardware.device())
    sums = {module: [[0, 0] for _ in anatomy.layers_of(model)] for module in WRITERS}

    def see(module: str, layer: int, x_BSC: Tensor) -> None:
        x_NC, both = x_BSC.flatten(0, -2).double(), sums[module][layer]
        both[0] = both[0] + x_NC.sum(0)
        both[1] = both[1] + x_NC.square().sum(0)

    with ExitStack() as stack:
        for module in WRITERS:
            stack.enter_context(seen(model, module, partial(see, module)))
        for tokens_BS, positions_BS in batches(bench.calibration):
            anatomy.body_of(model)(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
    tokens = bench.calibration.num_tokens
    return {
        module: tuple(torch.stack(parts).float() / tokens for parts in zip(*each, strict=True))
        for module, each in sums.items()
    }


def weights(model: PreTrainedModel, module: str) -> Tensor:
    """Of a module of each layer, [L, O, I]."""
    return torch.stack([layer.get_submodule(module).weight.detach() for layer in anatomy.layers_of(model)])


@torch.no_grad()
def keep_neurons(layer: nn.Module, kept: Sequence[int]) -> None:
    """Leave only these neurons in the FFN of a layer, whatever the other layers have."""
    mlp, index = layer.get_submodule("mlp"), torch.tensor(kept)
    for name in READS:
        _keep(mlp.get_submodule(name), 0, index)
    _keep(mlp.get_submodule(WRITE), 1, index)


@torch.no_grad()
def keep_groups(layer: nn.Module, kept: Sequence[int], *, per_group: int, head_dim: int) -> None:
    """Leave only these key-value groups, with their query heads, in the attention of a layer."""
    attention = layer.get_submodule("self_attn")

    def rows(width: int) -> Tensor:
        return torch.cat([torch.arange(group * width, (group + 1) * width) for group in kept])

    _keep(attention.get_submodule("q_proj"), 0, rows(per_group * head_dim))
    for name in ("k_proj", "v_proj"):
        _keep(attention.get_submodule(name), 0, rows(head_dim))
    _keep(attention.get_submodule("o_proj"), 1, rows(per_group * head_dim))


def _keep(linear: nn.Module, dim: int, index: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.index_select(dim, index))
    linear.out_features, linear.in_features = linear.weight.shape
