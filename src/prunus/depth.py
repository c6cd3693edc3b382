"""What depth is worth: the loss without each layer, once for all or again after each layer that leaves.

Shapes: L layers, B blocks, S tokens of a block, H hidden channels, N predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prunus import layerwise
from prunus.checkpoint import Checkpoint
from prunus.head import head_of
from prunus.layerwise import TokenBlocks
from prunus.measure import BATCH_BLOCKS, Statistics
from prunus.source import Source, opened

ABOVE = 1.0001
"""A layer that leaves later has at least so much more."""
LEAST = 0.5
"""Share of the layers that is left when `iterative` stops."""


@torch.no_grad()
def leave_one_out(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    without: Collection[int] = (),
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, Tensor]:
    """Loss of the teacher, and with each layer removed.

    Layer-major: the variants "without layer j", j ≤ i, go through layer i together with the whole model, so weights
    are read once and the shared prefix is computed once: L²/2 layer passes instead of L².

    Args:
        without: layers that are gone already.
    Returns:
        loss of the whole model, and float32 [L] losses, nats per predicted token; NaN for those that are gone.
    """
    source, count = source or opened(teacher), teacher.architecture.layers
    here = [layer for layer in range(count) if layer not in without]
    total, counted = torch.zeros(len(here) + 1, dtype=torch.float64), 0
    with source.outer():
        whole = layerwise.enter_all(source.model, blocks, batch_blocks=BATCH_BLOCKS)
    variants: list[list[Tensor]] = [[] for _ in whole]
    for number, layer in enumerate(source.layers()):
        if number in without:
            continue
        for batch, streams in zip(whole, variants, strict=True):
            inputs = batch.layer_inputs[number]
            streams[:] = [layerwise.run_layer(layer, stream, inputs) for stream in streams]
            streams.append(batch.stream_BSH)
            batch.stream_BSH = layerwise.run_layer(layer, batch.stream_BSH, inputs)
        progress(number + 1, count)
    family, model = teacher.family, source.model
    with source.filled(family.final_norm) as norm, source.filled(family.head):
        for place, (batch, streams) in enumerate(zip(whole, variants, strict=True)):
            start = place * BATCH_BLOCKS
            indices = list(range(start, start + len(batch.stream_BSH)))
            tokens_BS, positions_BS = (part.to(batch.stream_BSH.device) for part in blocks.batch(indices))
            targets_BS = positions_BS[:, 1:] == positions_BS[:, :-1] + 1
            counted += int(targets_BS.sum())
            for variant, stream in enumerate([*streams, batch.stream_BSH]):
                hidden_NH = norm(stream)[:, :-1][targets_BS]
                total[variant] += _summed_loss(model, hidden_NH, tokens_BS[:, 1:][targets_BS])
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
    source, count = source or opened(teacher), teacher.architecture.layers
    rises_L, gone, least = torch.full((count,), math.nan), list[int](), 0.0
    steps = max(1, math.floor((1 - LEAST) * count))
    for step in range(steps):
        whole, losses_L = leave_one_out(teacher, blocks, without=gone, source=source)
        leaves = int(losses_L.nan_to_num(math.inf).argmin())
        least = max(least * ABOVE, float(losses_L[leaves]) - whole, 1e-6)
        rises_L[leaves] = least
        gone.append(leaves)
        rest_L = losses_L - whole
        progress(step + 1, steps)
    return torch.where(rises_L.isnan(), rest_L.clamp_min(least * ABOVE), rises_L)


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


KINDS = {"leave_one_out": rises, "iterative": iterative}
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
    return replace(statistics, sums={**statistics.sums, kind: found})


def _summed_loss(model: PreTrainedModel, hidden_NH: Tensor, labels_N: Tensor, *, chunk_tokens: int = 256) -> float:
    """Σ cross-entropy, the logits a chunk at a time in float32."""
    total = 0.0
    for hidden, labels in zip(hidden_NH.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True):
        total += float(F.cross_entropy(head_of(model).logits(hidden), labels, reduction="sum"))
    return total
