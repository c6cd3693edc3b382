"""The loss of a step: it depends on the documents, not on how they lie in blocks and micro-batches."""

import numpy as np
import pytest
import torch
from conftest import KINDS, tiny_model

from prunus.families import known_families
from prunus.masters import Masters
from prunus.schedule import Settings, plan
from prunus.step import Losses, accumulate
from prunus.teacher import Live
from prunus.text import Blocks

DOCUMENT, DOCUMENTS = 16, 8


def packed(order, per_block):
    """The same documents in this order, so many in a block."""
    tokens = np.random.default_rng(0).integers(0, 97, (DOCUMENTS, DOCUMENT))[list(order)]
    positions = np.broadcast_to(np.arange(DOCUMENT), tokens.shape)
    shape = (DOCUMENTS // per_block, per_block * DOCUMENT)
    blocks = [part.reshape(shape).astype("<u2") for part in (tokens, positions)]
    return Blocks(*blocks, np.ones(shape[0], np.int64), "packed")


def losses_and_gradients(teacher, student, blocks, dtype, **choices):
    settings = Settings(tokens=DOCUMENTS * DOCUMENT, batch_tokens=DOCUMENTS * DOCUMENT, hidden_loss=None)
    model = student.module(torch.float32)
    losses = Losses(
        model,
        Live(teacher.module(dtype).requires_grad_(False)),
        blocks,
        settings,
        None,
        **{"micro_blocks": 1} | choices,
    )
    masters = Masters(losses, dtype, weight_decay=0.0)
    masters.publish()
    schedule = plan(settings, hidden=48, num_blocks=len(blocks), block_size=blocks.block_size)
    point = accumulate(losses, masters, [], schedule)
    masters.clip(float("inf"))
    return point["loss"], torch.cat([value.grad.flatten() for value in masters.values.values()])


@pytest.mark.parametrize("family", known_families())
def test_neither_packing_nor_the_split_nor_the_chunk_changes_a_gradient(family, tmp_path):
    teacher = tiny_model(family, tmp_path / "teacher")
    smaller = {"mamba2": {"num_hidden_layers": 3}, "solar_open": {"moe_intermediate_size": 16}}.get(
        family, {"intermediate_size": 24}
    )
    student = tiny_model(family, tmp_path / "student", **smaller)
    # The state of Mamba and of linear attention goes on from document to document in a block.
    several = (1, 1) if any(branch.name in ("mamba", "delta") for branch in teacher.family.branches) else (2, 4)
    ways = {
        "one document a block": (packed(range(8), 1), {}),
        "two": (packed([3, 1, 0, 2, 7, 5, 4, 6], several[0]), {}),
        "four, whole batch, small chunks": (
            packed(reversed(range(8)), several[1]),
            {"micro_blocks": 2, "chunk_tokens": 10},
        ),
    }
    exact, rounded = (1e-5, 0.02) if several == (2, 4) else (5e-5, 0.03)  # a recurrence rounds step upon step
    types = ((torch.float32, exact), (torch.bfloat16, rounded))
    if family not in KINDS:  # masks are a type's own, the rest is that of its kind
        types, ways = types[:1], {name: way for name, way in ways.items() if name != "two"}
    for dtype, tolerance in types:
        found = [losses_and_gradients(teacher, student, blocks, dtype, **rest) for blocks, rest in ways.values()]
        for loss, gradient in found[1:]:
            assert loss == pytest.approx(found[0][0], rel=tolerance, abs=2e-6)
            assert (gradient - found[0][1]).norm() < tolerance * found[0][1].norm() + 2e-6
