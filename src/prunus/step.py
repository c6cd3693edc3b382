"""One optimizer step up to its gradients: micro-batches through teacher and student, and their losses.

Shapes: B blocks of a micro-batch, S tokens of a block, N = B·S, H student channels.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import hardware, hidden, parallel
from prunus.fused import divergence, head_of
from prunus.masters import Masters
from prunus.schedule import Plan, Settings
from prunus.teacher import Live, Teacher
from prunus.text import Blocks, batch_indices, targets


class Losses(nn.Module):
    """The losses of some blocks. A module, so that FSDP gathers the output head for the loss as it does for the model;
    the teacher is kept out of its parameters."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        blocks: Blocks,
        settings: Settings,
        pairs: hidden.Pairs | None,
        micro_blocks: int,
    ) -> None:
        super().__init__()
        self.student, self.micro_blocks = student, micro_blocks
        self.settings, self.blocks, self.pairs = settings, blocks, pairs
        self._teacher = (teacher,)  # in a tuple: a module that is an attribute would be a part of this one

    def forward(self, indices: list[int], num_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Divergence and hidden-state loss of these blocks, each divided by the tokens of the whole step."""
        (teacher,) = self._teacher
        settings, device = self.settings, hardware.device()
        tokens_BS, positions_BS = (part.to(device) for part in self.blocks.batch(indices))
        mask_N = targets(tokens_BS, positions_BS).flatten()
        pairs = self.pairs if settings.hidden_loss else None
        with contextlib.ExitStack() as stack:
            mine = theirs = {}
            if pairs is not None and isinstance(teacher, Live):
                mine, theirs = (
                    stack.enter_context(hidden.captured(model, [pair[side] for pair in pairs.layers]))
                    for side, model in enumerate((self.student, teacher.model))
                )
            wanted = teacher.targets(indices, tokens_BS, positions_BS)
            student_BSH = self.student.base_model(
                input_ids=tokens_BS, position_ids=positions_BS, use_cache=False
            ).last_hidden_state
        loss = divergence(
            settings.divergence,
            student_BSH.flatten(0, 1),
            head_of(self.student),
            wanted,
            num_tokens=num_tokens,
            temperature=settings.temperature,
            mix=settings.mix,
            mask_N=mask_N,
            label_N=tokens_BS.roll(-1, dims=1).flatten(),
            cross_entropy_share=settings.cross_entropy_share,
        )
        if pairs is None or settings.hidden_loss is None:
            return loss, None
        return loss, hidden.loss(settings.hidden_loss, pairs, mine, theirs, num_tokens=num_tokens, mask_N=mask_N)


def accumulate(losses: Losses, masters: Masters, weight: float, step: int, schedule: Plan) -> dict[str, Any]:
    """Gradients of one step on the masters, and its losses. Every micro-batch is divided by the tokens of the whole
    step, over all ranks, so the result depends neither on the split nor on their number.

    Args:
        weight: of the hidden-state loss.
    """
    settings, blocks = losses.settings, losses.blocks
    indices = batch_indices(step, schedule.batch_blocks, len(blocks), settings.seed)
    num_tokens = int(targets(*blocks.batch(indices)).sum())
    sums = {"loss": 0.0} | ({"hidden_loss": 0.0} if settings.hidden_loss else {})
    mine = parallel.share(indices)
    for start in range(0, len(mine), losses.micro_blocks):
        stop = start + losses.micro_blocks
        parallel.sync_gradients(losses, stop >= len(mine))
        loss, hidden_loss = losses(mine[start:stop], num_tokens)
        sums["loss"] += float(loss.detach())
        if hidden_loss is not None:
            sums["hidden_loss"] += float(hidden_loss.detach())
            loss = loss + weight * hidden_loss
        loss.backward()
    return parallel.total(sums)


def hidden_weight(curve: list[dict[str, Any]], settings: Settings) -> float:
    """α = hidden_weight · L_logits / L_hidden, so that both pull alike (Minitron, arXiv:2407.14679, eq. 6): of the last
    step that was not left out, so that it does not depend on how this one is split; 0 before there is one."""
    done = next((point for point in reversed(curve) if "skipped" not in point), None)
    if settings.hidden_loss is None or done is None:
        return 0.0
    return settings.hidden_weight * done["loss"] / max(done["hidden_loss"], 1e-12)
