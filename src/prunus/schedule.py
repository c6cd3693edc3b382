"""How long and how fast a student learns: settings, made concrete for a model and a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunus.errors import BadData

UNIT_RATE = 2.5e-4
"""Learning rate of a student with 576 hidden channels that is 1 nat from its teacher."""
LARGEST_STEP = 1.5e-3
"""Of a step on one block, as a share of the weights: Adam moves each by about the learning rate, however small it is.
Models differ by ten times in the size of their weights; measured on Gemma 3 270M, see LOG.md."""
NATS = 0.05, 4.0
"""Divergences between which `distance` follows them."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a distillation; what is None is derived from the model and the amount of text.

    Attributes:
        tokens: training tokens; more than the text holds means more epochs. None: the text once.
        batch_tokens: tokens of an optimizer step. None: at least 256 steps, at most 512 blocks a step.
        micro_blocks: blocks that go through the model at once; results differ by rounding only. None: what fits.
        learning_rate: peak. None: 2.5e-4 · √(576 / hidden) · √KL, where KL is the mean divergence of the warm-up, in
            nats; at hidden 4096 and 1 nat 0.9e-4 (Minitron, arXiv:2408.11796: 1e-4). See `distance`. Of small weights
            less: at most `LARGEST_STEP` · their size · √(blocks of a step) · √KL.
        schedule: key of `SCHEDULES`.
        final_share: learning rate at the end, as a share of the peak.
        warmup_share: share of the steps with a linearly rising learning rate.
        decay_share: of "wsd", share of the steps in which it falls.
        weight_decay: of AdamW, on matrices.
        clip: largest norm of the gradient.
        divergence: key of `losses.DIVERGENCES`.
        temperature: of the divergence.
        mix: β or α of the divergences that mix teacher and student.
        cross_entropy_share: of the loss, on the text itself.
        hidden_loss: key of `losses.HIDDEN_LOSSES`, for students cut out of their teacher; None: logits only.
        hidden_weight: of it, relative to the divergence: at 1 both have the same size.
        hidden_layers: how many layers it compares.
        on_policy_share: of the steps, in which the student continues the text itself (see `on_policy`).
        evaluate_every: steps between measurements of the held-out loss; 0: never.
        patience: measurements without a lower held-out loss before training ends early; 0: never.
        seed: of the order of the text.
    """

    tokens: int | None = None
    batch_tokens: int | None = None
    micro_blocks: int | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    final_share: float = 0.1
    warmup_share: float = 0.05
    decay_share: float = 0.2
    weight_decay: float = 0.0
    clip: float = 1.0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    mix: float = 0.5
    cross_entropy_share: float = 0.0
    hidden_loss: str | None = None
    hidden_weight: float = 1.0
    hidden_layers: int = 4
    on_policy_share: float = 0.0
    evaluate_every: int = 0
    patience: int = 0
    seed: int = 0

    @property
    def learns_from_samples(self) -> bool:
        """Whether a cache of the teacher's samples could stand in for it."""
        return self.divergence == "forward_kl" and self.hidden_loss is None and not self.on_policy_share


@dataclass(frozen=True)
class Plan:
    """`Settings` made concrete for one student and text.

    Attributes:
        learning_rate: peak, of a student that is 1 nat from its teacher where it goes `by_distance`.
        by_distance: multiply it by `distance`.
    """

    steps: int
    batch_blocks: int
    block_size: int
    learning_rate: float
    warmup_steps: int
    by_distance: bool

    @property
    def tokens(self) -> int:
        return self.tokens_after(self.steps)

    def tokens_after(self, steps: int) -> int:
        return steps * self.batch_blocks * self.block_size


def plan(
    settings: Settings,
    *,
    hidden: int,
    num_blocks: int,
    block_size: int,
    distilled: bool = True,
    size: float = math.inf,
) -> Plan:
    """Steps, batch and learning rate.

    Args:
        hidden: channels of the student.
        distilled: from a teacher, not from the text itself.
        size: of the weights it starts from, see `weight_size`; infinity of random ones, which may go far.
    Raises:
        BadData: the text is less than one step.
    """
    tokens = settings.tokens or num_blocks * block_size
    blocks = max(1, tokens // block_size)
    if settings.batch_tokens is not None:
        batch_blocks = max(1, settings.batch_tokens // block_size)
    else:
        batch_blocks = min(512, 2 ** int(math.log2(max(1, blocks // 256))))
    steps = blocks // batch_blocks
    if steps < 1:
        raise BadData(
            f"distillation needs at least one step of {batch_blocks * block_size} tokens, but there are {tokens}; "
            "give more text or a smaller batch"
        )
    derived = min(UNIT_RATE * math.sqrt(576 / hidden), LARGEST_STEP * size * math.sqrt(batch_blocks))
    rate = settings.learning_rate or derived
    forward_kl = settings.divergence == "forward_kl" and not settings.cross_entropy_share
    by_distance = distilled and forward_kl and settings.learning_rate is None
    return Plan(steps, batch_blocks, block_size, rate, max(1, round(settings.warmup_share * steps)), by_distance)


def check_shared(plan: Plan, ranks: int) -> None:
    """Raises BadData if ranks cannot have equal parts of a step."""
    if plan.batch_blocks % ranks:
        raise BadData(
            f"a step of {plan.batch_blocks} blocks cannot be shared evenly by {ranks} ranks; "
            f"set distill.batch_tokens to a multiple of {ranks * plan.block_size:,}"
        )


def learning_rate(step: int, plan: Plan, settings: Settings, losses: Sequence[float]) -> float:
    """Of one step: linear warm-up to the peak, then down to `final_share` of it at the last step.

    Args:
        losses: of the steps so far, this one among them.
    """
    peak = plan.learning_rate * (distance(losses[: plan.warmup_steps]) if plan.by_distance else 1)
    if step < plan.warmup_steps:
        return peak * (step + 1) / plan.warmup_steps
    done = min(1.0, (step - plan.warmup_steps) / max(1, plan.steps - 1 - plan.warmup_steps))
    height = SCHEDULES[settings.schedule](done, settings)
    return peak * (settings.final_share + (1 - settings.final_share) * height)


def distance(losses: Sequence[float]) -> float:
    """Root of the mean divergence, within `NATS`: near the teacher a divergence grows with the square of the way that
    the weights have to go, and Adam goes as far in a step as the rate says."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    least, most = NATS
    return math.sqrt(min(max(sum(finite) / max(1, len(finite)), least), most))


def _cosine(done: float, settings: Settings) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _warmup_stable_decay(done: float, settings: Settings) -> float:
    """1 − √x in the last `decay_share`, which Hägele et al. (arXiv:2405.18392) found better than linear."""
    falling = max(0.0, 1 - (1 - done) / settings.decay_share) if settings.decay_share else float(done >= 1)
    return 1 - math.sqrt(falling)


SCHEDULES: Mapping[str, Callable[[float, Settings], float]] = {
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
    "constant": lambda done, settings: 1.0,
}
"""Share of the way from start (0) to end (1) after warm-up → height between `final_share` (0) and the peak (1)."""
