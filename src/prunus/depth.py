"""What depth is worth: the loss without each layer, once for all or again after each layer that leaves.

Shapes: L layers, B blocks, S tokens of a block, H hidden channels, N predicted tokens.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, layerwise
from prunus.checkpoint import Checkpoint
from prunus.errors import BadRecipe
from prunus.head import Head, head_of
from prunus.layerwise import TokenBlocks
from prunus.measure import BATCH_BLOCKS, Statistics
from prunus.measuring import blocks_at_once
from prunus.source import Source, opened

ABOVE = 1.0001
"""A layer that leaves later has at least so much more."""
LEAST = 0.5
"""Share of the layers that is left when `iterative` and `contiguous` stop."""
CHUNK_TOKENS = 256

Damage = Callable[[Tensor, Callable[[], Tensor], Tensor], Tensor]
"""Of logits, those of the whole model where they are asked for, and the right tokens; summed over tokens."""
Missed = Callable[[list[int], Collection[int] | None], tuple[float, Tensor]]
"""Of layers that are gone and those to try (None: all): how bad the model is, and float32 [L] how bad without each of
these too, NaN for the others."""


@torch.no_grad()
def leave_one_out(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    without: Collection[int] = (),
    only: Collection[int] | None = None,
    damage: Damage | None = None,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, Tensor]:
    """Loss of the teacher, and with each layer removed.

    The variants "without layer j", j ≤ i, go through layer i together with the whole model, so that the shared prefix
    is computed once: L²/2 layer passes instead of L². A few blocks at a time; where layers come from the disk, as many
    as fit, because each time all of them are read.

    Args:
        without: layers that are gone already.
        only: layers to try; default: all.
        damage: what is measured instead of the loss.
    Returns:
        loss of the whole model, and float32 [L] losses, nats per predicted token; NaN for those that are not tried.
    """
    source, count, damage = source or opened(teacher), teacher.architecture.layers, damage or _loss
    here = [layer for layer in range(count) if layer not in without and (only is None or layer in only)]
    total, counted = torch.zeros(len(here) + 1, dtype=torch.float64), 0
    size = blocks.batch([0])[0].shape[1]
    group = BATCH_BLOCKS if source.whole else blocks_at_once(teacher, streams=len(here) + 2, block_size=size)
    starts = range(0, len(blocks), group)
    for turn, start in enumerate(starts):
        places = range(start, min(start + group, len(blocks)))
        with source.outer():
            whole = layerwise.enter_all(source.model, blocks, batch_blocks=BATCH_BLOCKS, places=places)
        variants: list[list[Tensor]] = [[] for _ in whole]
        for number, layer in enumerate(source.layers()):
            if number in without:
                continue
            for batch, streams in zip(whole, variants, strict=True):
                inputs = batch.layer_inputs[number]
                streams[:] = [layerwise.run_layer(layer, stream, inputs) for stream in streams]
                if number in here:
                    streams.append(batch.stream_BSH)
                batch.stream_BSH = layerwise.run_layer(layer, batch.stream_BSH, inputs)
            progress((turn * count + number + 1) // len(starts), count)
        with source.filled(teacher.family.final_norm) as norm, source.filled(teacher.family.head):
            for batch, streams in zip(whole, variants, strict=True):
                indices, places = list(places[: len(batch.stream_BSH)]), places[len(batch.stream_BSH) :]
                tokens_BS, positions_BS = (part.to(batch.stream_BSH.device) for part in blocks.batch(indices))
                targets_BS = positions_BS[:, 1:] == positions_BS[:, :-1] + 1
                counted += int(targets_BS.sum())
                whole_NH, labels_N = norm(batch.stream_BSH)[:, :-1][targets_BS], tokens_BS[:, 1:][targets_BS]
                for variant, stream in enumerate([*streams, batch.stream_BSH]):
                    hidden_NH = norm(stream)[:, :-1][targets_BS]
                    total[variant] += _summed(damage, head_of(source.model), hidden_NH, whole_NH, labels_N)
    losses = total / counted
    losses_L = torch.full((count,), math.nan)
    losses_L[here] = losses[:-1].float()
    return float(losses[-1]), losses_L


def iterative(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """float32 [L]: rise of the loss when a layer leaves, after those that leave before it have left.

    Each time the one leaves without which the loss is lowest, down to half of the layers; the others have the rise that
    each alone would bring then. Higher stays longer: a layer has at least what the one that left before it has.
    """
    count = teacher.architecture.layers
    missed = _by_loss(teacher, blocks, source)
    left = _left_one_by_one(missed, count, max(1, math.floor((1 - LEAST) * count)), lambda gone: None, progress)
    return torch.where(left.rises_L.isnan(), left.others_L.clamp_min(left.most * ABOVE), left.rises_L)


def _by_loss(teacher: Checkpoint, blocks: TokenBlocks, source: Source | None) -> Missed:
    source = source or opened(teacher)
    return lambda gone, only: leave_one_out(teacher, blocks, without=gone, only=only, source=source)


@dataclass(frozen=True)
class _Left:
    """Layers that left one by one.

    Attributes:
        rises_L: of the loss when each left, ascending; NaN for those that stayed.
        others_L: what each of those that were tried last would have brought.
        most: the highest rise.
    """

    rises_L: Tensor
    others_L: Tensor
    most: float

    @property
    def layers(self) -> list[int]:
        return [layer for layer, rise in enumerate(self.rises_L.tolist()) if not math.isnan(rise)]


def _left_one_by_one(
    missed: Missed,
    count: int,
    steps: int,
    tried: Callable[[list[int]], Collection[int] | None],
    progress: Callable[[int, int], None],
) -> _Left:
    """Each time the least missed leaves of those that `tried` names, given the ones that are gone, ascending."""
    left = _Left(torch.full((count,), math.nan), torch.zeros(()), 0.0)
    for step in range(steps):
        gone = left.layers
        whole, losses_L = missed(gone, tried(gone))
        leaves = int(losses_L.nan_to_num(math.inf).argmin())
        most = max(left.most * ABOVE, float(losses_L[leaves]) - whole, 1e-6)
        rises_L = left.rises_L.clone()
        rises_L[leaves] = most
        left = _Left(rises_L, losses_L - whole, most)
        progress(step + 1, steps)
    return left


def rises(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """float32 [L]: rise of the loss when a layer alone leaves."""
    whole, losses_L = leave_one_out(teacher, blocks, source=source, progress=progress)
    return losses_L - whole


def logit_mse(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """float32 [L]: mean squared change of the logits when a layer alone leaves."""
    _, changes_L = leave_one_out(teacher, blocks, damage=_squared_change, source=source, progress=progress)
    return changes_L


def contiguous(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """float32 [L]: as `iterative`, but what leaves is one run of neighbours.

    It begins with the layer that is missed least and grows at that end where the loss rises less, down to half of the
    layers. The first layer and the last are not tried. Source: the depth-pruned models of arXiv:2408.11796, which
    remove one run of layers; of those that differ in length each has the next shorter one inside.
    """
    return _one_run(_by_loss(teacher, blocks, source), teacher.architecture.layers, progress)


def contiguous_by_task(
    source: Source,
    errors: Callable[[PreTrainedModel], float],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """float32 [L]: as `contiguous`, by what a task says instead of the loss. Source: arXiv:2408.11796, which chose its
    layers by Winogrande.

    Args:
        source: the model, whole.
        errors: share of a task's answers that a model gets wrong.
    Raises:
        BadRecipe: the model is on disk.
    """
    if not source.whole:
        raise BadRecipe(
            "contiguous_by_task: a task needs the whole model, which is too large for the free memory; choose another "
            "score of layers"
        )
    model, layers = source.model, anatomy.layers_of(source.model)

    @functools.cache
    def without(gone: frozenset[int]) -> float:
        with contextlib.ExitStack() as stack:
            for layer in gone:
                stack.callback(layers[layer].register_forward_hook(_passed_by, with_kwargs=True).remove)
            return errors(model)

    def missed(gone: list[int], only: Collection[int] | None) -> tuple[float, Tensor]:
        errors_L = torch.full((len(layers),), math.nan)
        for layer in range(len(layers)) if only is None else only:
            errors_L[layer] = without(frozenset([*gone, layer]))
        return without(frozenset(gone)), errors_L

    return _one_run(missed, len(layers), progress)


def _passed_by(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """What a layer gives if it does nothing."""
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _one_run(missed: Missed, count: int, progress: Callable[[int, int], None]) -> Tensor:
    """float32 [L], for `contiguous`."""
    if count < 3:
        return torch.ones(count)

    def ends(gone: list[int]) -> list[int]:
        found = [gone[0] - 1, gone[-1] + 1] if gone else range(count)
        return [layer for layer in found if 0 < layer < count - 1]

    steps = min(max(1, math.floor((1 - LEAST) * count)), count - 2)
    left = _left_one_by_one(missed, count, steps, ends, progress)
    apart_L = torch.tensor([min(abs(layer - end) for end in left.layers) for layer in range(count)]).float()
    # The others leave from the middle outwards, if at all: nearest to the run first.
    return torch.where(left.rises_L.isnan(), left.most * ABOVE ** (1 + apart_L), left.rises_L)


KINDS = {"leave_one_out": rises, "iterative": iterative, "logit_mse": logit_mse, "contiguous": contiguous}
"""What `with_depth` adds, by the name of the score that is made from it."""


def with_depth(
    kind: str,
    teacher: Checkpoint,
    statistics: Statistics,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """The statistics with what one of the scores of layers in `KINDS` needs."""
    found = KINDS[kind](teacher, blocks, source=source, progress=progress)
    return statistics.with_sums({kind: found})


def _loss(logits_NV: Tensor, whole_NV: Callable[[], Tensor], labels_N: Tensor) -> Tensor:
    """Σ cross-entropy."""
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def _squared_change(logits_NV: Tensor, whole_NV: Callable[[], Tensor], labels_N: Tensor) -> Tensor:
    """Σ over tokens of the mean square over the vocabulary."""
    return (logits_NV - whole_NV()).square().mean(1).sum()


def _summed(damage: Damage, head: Head, hidden_NH: Tensor, whole_NH: Tensor, labels_N: Tensor) -> float:
    """Damage of these states, the logits a chunk at a time in float32."""
    parts = (tensor.split(CHUNK_TOKENS) for tensor in (hidden_NH, whole_NH, labels_N))
    return sum(
        float(damage(head.logits(hidden), partial(head.logits, whole), labels))
        for hidden, whole, labels in zip(*parts, strict=True)
    )
