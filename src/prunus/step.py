"""One optimizer step up to its gradients: micro-batches through teacher and student, and their losses.

Shapes: B blocks of a micro-batch, S tokens of a block, N = B·S, H student channels.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, hardware, hidden, on_policy, parallel
from prunus.fused import CHUNK_TOKENS, divergence
from prunus.head import head_of
from prunus.masters import Masters
from prunus.schedule import Plan, Settings
from prunus.teacher import Live, Teacher
from prunus.text import Blocks, batch_indices, targets

STUDENT = "student."
"""How the names of the student's parameters begin in `Losses`."""
FIT_BLOCKS = 8
"""Blocks of text on which projectors are fitted before they are trained."""


class Batch(NamedTuple):
    """Blocks of a step.

    Attributes:
        indices: of the blocks in the text.
        tokens_BS, positions_BS: int64.
        mask_BS: where the prediction of the next token counts, bool.
        own: whether the student wrote it, so that its next tokens teach nothing.
    """

    indices: list[int]
    tokens_BS: Tensor
    positions_BS: Tensor
    mask_BS: Tensor
    own: bool = False

    def part(self, start: int, stop: int) -> Batch:
        some = slice(start, stop)
        return Batch(self.indices[some], self.tokens_BS[some], self.positions_BS[some], self.mask_BS[some], self.own)


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
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        super().__init__()
        self.student, self.micro_blocks, self.chunk_tokens = student, micro_blocks, chunk_tokens
        self.settings, self.blocks, self.pairs = settings, blocks, pairs
        self._teacher = (teacher,)  # in a tuple: a module that is an attribute would be a part of this one
        self.projectors = None
        if pairs is not None and pairs.channels is None and settings.hidden_loss and isinstance(teacher, Live):
            some = [part.to(hardware.device()) for part in blocks.batch(range(min(FIT_BLOCKS, len(blocks))))]
            self.projectors = hidden.projectors(pairs, student, teacher, *some)

    def forward(self, batch: Batch, num_tokens: int, expected: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Divergence and hidden-state loss of these blocks, each divided by the tokens of the whole step. `expected` is
        the divergence of the last one of its kind."""
        (teacher,) = self._teacher
        settings, (indices, tokens_BS, positions_BS, mask_BS, own) = self.settings, batch
        mask_N = mask_BS.flatten()
        pairs = self.pairs if settings.hidden_loss else None
        with contextlib.ExitStack() as stack:
            mine = theirs = {}
            if pairs is not None and isinstance(teacher, Live):
                mine, theirs = (
                    stack.enter_context(hidden.captured(model, [pair[side] for pair in pairs.layers]))
                    for side, model in enumerate((self.student, teacher.model))
                )
            wanted = teacher.targets(indices, tokens_BS, positions_BS)
            student_BSH = anatomy.body_of(self.student)(
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
            cross_entropy_share=0.0 if own else settings.cross_entropy_share,
            chunk_tokens=self.chunk_tokens,
            expected=expected,
        )
        if pairs is None or settings.hidden_loss is None:
            return loss, None
        states = (pairs, mine, theirs, self.projectors)
        return loss, hidden.loss(settings.hidden_loss, *states, num_tokens=num_tokens, mask_N=mask_N)


def accumulate(losses: Losses, masters: Masters, curve: list[dict[str, Any]], schedule: Plan) -> dict[str, Any]:
    """Gradients of the step after those of `curve` on the masters, and its losses. Every micro-batch is divided by the
    tokens of the whole step, over all ranks, so the result depends neither on the split nor on their number."""
    weight, earlier = hidden_weight(curve, losses.settings), _last(curve, losses.settings)
    sums = {"loss": 0.0} | ({"hidden_loss": 0.0} if losses.settings.hidden_loss else {})
    mine = _batch(losses, len(curve), schedule)
    num_tokens = int(parallel.total({"tokens": int(mine.mask_BS.sum())})["tokens"])
    for start in range(0, len(mine.indices), losses.micro_blocks):
        stop = start + losses.micro_blocks
        loss, hidden_loss = losses(mine.part(start, stop), max(num_tokens, 1), earlier and earlier["loss"])
        sums["loss"] += float(loss.detach())
        if hidden_loss is not None:
            sums["hidden_loss"] += float(hidden_loss.detach())
            loss = loss + weight * hidden_loss
        loss.backward()
    return parallel.total(sums)


def _batch(losses: Losses, step: int, schedule: Plan) -> Batch:
    """This rank's blocks of a step: text, or what the student makes of it."""
    settings, blocks, device = losses.settings, losses.blocks, hardware.device()
    indices = parallel.share(batch_indices(step, schedule.batch_blocks, len(blocks), settings.seed))
    tokens_BS, positions_BS = (part.to(device) for part in blocks.batch(indices))
    if not on_policy.is_due(step, settings.on_policy_share):
        return Batch(indices, tokens_BS, positions_BS, targets(tokens_BS, positions_BS))
    seeds = on_policy.seeds(settings.seed, step, indices)
    with parallel.gathered(losses):
        parts = [
            on_policy.continued(losses.student, tokens_BS[some], seeds=seeds[some])
            for some in (slice(at, at + losses.micro_blocks) for at in range(0, len(indices), losses.micro_blocks))
        ]
    tokens_BS, positions_BS, mask_BS = (torch.cat(values) for values in zip(*parts, strict=True))
    return Batch(indices, tokens_BS, positions_BS, mask_BS, own=True)


def hidden_weight(curve: list[dict[str, Any]], settings: Settings) -> float:
    """α = hidden_weight · L_logits / L_hidden, so that both pull alike (Minitron, arXiv:2407.14679, eq. 6): of the last
    step of its kind, so that it does not depend on how this one is split; 0 before there is one."""
    done = _last(curve, settings)
    if settings.hidden_loss is None or done is None:
        return 0.0
    return settings.hidden_weight * done["loss"] / max(done["hidden_loss"], 1e-12)


def _last(curve: list[dict[str, Any]], settings: Settings) -> dict[str, Any] | None:
    """The last step that was not left out, on text if the next one is, else on what the student wrote."""
    share, last = settings.on_policy_share, len(curve)
    alike = (curve[s] for s in reversed(range(last)) if on_policy.is_due(s, share) == on_policy.is_due(last, share))
    return next((point for point in alike if "skipped" not in point), None)
