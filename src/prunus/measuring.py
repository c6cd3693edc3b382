"""Peak memory of measuring, predicted from sizes alone, and what to do where it does not fit.

All numbers are bytes. H channels of the stream, F columns that a write projection reads, K rows of a sketch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from prunus import cost, hardware, memory, sensitivity
from prunus.checkpoint import Checkpoint
from prunus.memory import Fits
from prunus.source import Source, too_large

BATCH_BLOCKS = 4
"""Blocks that go through a layer at once."""
SUMMED = ("mamba_heads", "linear_heads")
"""Axes of whose parts no damage is foretold: their scores are sums of what each writes."""
LOGIT_BYTES = 20
"""Of each logit of a chunk: itself, its scaled copy, the softmax that labels are drawn from or the loss keeps, and two
gradients, in float32."""


def measuring(
    teacher: Checkpoint,
    *,
    blocks: int,
    block_size: int,
    gradients: bool = True,
    device: str | None = None,
    streamed: bool = False,
) -> dict[str, int]:
    """Bytes of each part while a model is measured (see `measure.measure`), in the larger of its two passes.

    One is backwards through the whole model, of a batch of a few blocks (see `sensitivity`). The other walks through
    the layers: of all tokens there is the stream, and what layers are called with, a mask of a byte for each key and
    rotary tables; of one batch what a layer makes of it; and what the damage of its parts is foretold from.

    Args:
        blocks, block_size: of the text, in tokens.
        gradients: see `measure.measure`.
        device: "cpu" or "cuda", which need not be here (default: this machine's).
        streamed: the layers come from the disk one at a time; then there are no gradients.
    """
    options: dict[str, Any] = {"blocks": blocks, "block_size": block_size, "device": device or hardware.device().type}
    weights = _itemsize(teacher, device) * (
        cost.at_once(teacher.family, teacher.layout, teacher.architecture) if streamed else teacher.parameters
    )
    backwards = gradients and not streamed
    sketches = {"sketches": 4 * sensitivity.ROWS * teacher.architecture.hidden * _writes(teacher)} if backwards else {}
    passes = [_walk(teacher, **options)]
    passes += [_backwards(teacher, **options)] if backwards else []
    larger: dict[str, int] = max(passes, key=lambda parts: sum(parts.values()))
    return {"teacher": weights, **sketches, **larger}


def blocks_at_once(teacher: Checkpoint, *, streams: int, block_size: int) -> int:
    """Of how many blocks so many residual streams fit beside a layer that came from the disk; one at least."""
    one = measuring(teacher, blocks=1, block_size=block_size, gradients=False, streamed=True)
    of_a_block = one.pop("streams") * streams
    return max(1, (memory.room(None) - sum(one.values())) // of_a_block)


def check_measuring(
    teacher: Checkpoint,
    *,
    blocks: int,
    block_size: int,
    gradients: bool = True,
    source: Source | None = None,
    device: str | None = None,
    free: int | None = None,
) -> Fits:
    """How the measurement fits: with the whole teacher where that leaves room (see `source.too_large`), or streamed.

    Args:
        source: where the teacher is already; the weights of a whole one are not counted again.
        device: see `measuring`.
        free: bytes (default: what is free now).
    Raises:
        DoesNotFit: says what would.
    """
    free = hardware.free_memory() if free is None else free
    streamed = too_large(teacher, _itemsize(teacher, device), free) if source is None else not source.whole
    loaded, room = source is not None and source.whole, memory.room(free)

    def parts(**changes: Any) -> dict[str, int]:
        given = {"blocks": blocks, "block_size": block_size, "gradients": gradients, "device": device}
        found = measuring(teacher, streamed=streamed, **{**given, **changes})
        return found | {"teacher": 0} if loaded else found

    # Of tokens there may be as many as leave room for the rest of the walk, and sketches.
    walk, need = parts(gradients=False), parts()
    for_text = room - sum(walk.values()) + walk["streams"] - need.get("sketches", 0)
    tokens = blocks * block_size * for_text // max(1, walk["streams"])
    fewer = {f"measure.tokens={tokens // 1024}k": {"blocks": max(1, tokens // block_size)}}
    changes: dict[str, dict[str, Any]] = {
        **(fewer if tokens >= memory.LEAST_TOKENS else {}),
        "measure.gradients=false": {"gradients": False},
    }
    enough = [name for name, change in changes.items() if sum(parts(**change).values()) <= room]
    advice = f"This would fit: {'; '.join(enough)}." if enough else "Use shorter blocks (data.block_size)."
    return memory.checked("measuring", Fits(need, streamed), room, advice)


def _itemsize(teacher: Checkpoint, device: str | None) -> int:
    here = device in (None, hardware.device().type)
    return (hardware.fast_dtype(teacher.dtype) if here else teacher.dtype).itemsize


def _writes(teacher: Checkpoint) -> int:
    """Branches of all layers that write to the stream, of each of which there is a sketch."""
    having = cost.branch_layers(teacher.family, teacher.layout)
    return sum(len(having.get(branch.name, ())) for branch in teacher.family.branches if branch.write)


def _backwards(teacher: Checkpoint, *, blocks: int, block_size: int, device: str) -> dict[str, int]:
    """Activations of all layers; gradients of one of them, of what each branch writes, and two like what is summed."""
    batch = min(blocks, sensitivity.batch_blocks(block_size))
    rows = min(batch * block_size, sensitivity.CHUNK_TOKENS)
    activations, sizes = memory.activations(_pass(teacher, batch, block_size, device)), teacher.architecture
    written = batch * block_size * sizes.hidden * _itemsize(teacher, device) * _writes(teacher)
    summed = 8 * batch * block_size * (sensitivity.ROWS + sizes.hidden)
    return {
        "activations": int(memory.HOLES[device] * activations),
        "gradients": activations // sizes.layers + written + summed,
        "logits": LOGIT_BYTES * rows * teacher.architecture.vocab,
    }


def _walk(teacher: Checkpoint, *, blocks: int, block_size: int, device: str) -> dict[str, int]:
    family, sizes, itemsize = teacher.family, teacher.architecture, _itemsize(teacher, device)
    holes, hidden, batch = memory.HOLES[device], sizes.hidden, min(blocks, BATCH_BLOCKS)
    having = cost.branch_layers(family, teacher.layout)
    branches = [branch for branch in family.branches if branch.write and branch.name in having]
    widths = {branch: memory.written_from(branch, family, sizes) for branch in branches if branch.inner not in SUMMED}
    widest = max([hidden, *(memory.written_from(branch, family, sizes) for branch in branches)])
    # Layers with and without a window are called with their own masks and tables.
    kinds = len(set(cost.windows_of(family.text(teacher.config), sizes.layers)))
    called_with = kinds * (block_size + 2 * itemsize * sizes.get("head_dim", 0))
    layer = 0
    if any(branch.inner == "mamba_heads" for branch in branches):
        one = dataclasses.replace(_pass(teacher, batch, block_size, device), gradient_checkpointing=True)
        layer = memory.activations(one) - one.tokens * sizes.layers * itemsize * hidden
    found = {
        "streams": int(holes * blocks * block_size * (itemsize * hidden + called_with)),
        # four values in float32 as wide as an FFN, as in the repair; of Mamba products of states
        "a batch": int(holes * max(16 * widest * batch * block_size, layer)),
    }
    if not widths:
        return found
    # Of heads the squares of a group; the weight of the widest branch, and three more like what it writes or a sketch.
    groups = sizes.get("kv_heads", sizes.get("heads", 1))
    squares = [width**2 // groups for branch, width in widths.items() if branch.inner == "heads"]
    written_from = max(widths.values())
    return {**found, "damage": 4 * (2 * sum(squares) + written_from * (hidden + 3 * max(hidden, sensitivity.ROWS)))}


def _pass(teacher: Checkpoint, blocks: int, block_size: int, device: str) -> memory.Training:
    dtype = hardware.fast_dtype(teacher.dtype) if device == hardware.device().type else teacher.dtype
    need = memory.training(None, teacher, block_size=block_size, dtype=dtype, blocks=blocks)
    return dataclasses.replace(need, device=device)
