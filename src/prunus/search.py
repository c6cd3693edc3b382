"""Scores + cost + budget → legal candidate architectures, ranked by predicted damage; the best few built and measured.

The prediction: what an axis loses is the share of its score energy that is cut away, and what that costs in nats is
probed once per axis, by a cut of that axis alone, repaired and measured. A ranking before any retraining is a first
guess (Minitron, arXiv:2407.14679, sec. 4: rankings move until some 300 steps in), which is why several are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus import hardware
from prunus.architecture import AXES, Architecture
from prunus.budget import Budget
from prunus.checkpoint import Checkpoint
from prunus.errors import BudgetUnreachable
from prunus.evaluate import Quality, quality
from prunus.families import Family
from prunus.prune import build, cut, repaired
from prunus.scores import Scores
from prunus.selection import illegal_cut
from prunus.text import Blocks

TOLERANCE = 0.01
PROBED_AXES = ("layers", "hidden", "ffn", "heads")
ALIGNMENTS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Sizes are kept multiples of the largest of these that still lets the budget be met: fast on tensor cores."""


@dataclass(frozen=True)
class Candidate:
    """An architecture near the budget.

    Attributes:
        parameters: of the whole model, a tied head counted once.
        predicted_damage: nats per token above the teacher, from scores and probes.
        measured: on held-out text after repair, without training; None if it was not built.
    """

    architecture: Architecture
    parameters: int
    predicted_damage: float
    measured: Quality | None = None


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        candidates: best first; measured ones ahead of those that were only predicted.
        probes: axis → nats per token of a full loss of that axis, as extrapolated from its probe.
        considered: legal architectures within the tolerance.
        note: why the budget was missed by more than the tolerance, if so.
    """

    candidates: list[Candidate]
    probes: Mapping[str, float]
    considered: int
    note: str | None

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def lost_share(scores: Scores, teacher: Architecture, architecture: Architecture) -> dict[str, float]:
    """Share of each axis' score energy (Σ s²) that the best selection of this size cuts away, in [0, 1].

    Heads are ranked within their groups, so the axis "heads" covers both heads and groups.
    """
    per_layer = {axis: scores[axis] for axis in ("ffn", "kv_heads")}
    shares = {axis: _tail(values, architecture[axis]) for axis, values in per_layer.items()}
    grouped = scores["heads"].unflatten(-1, (teacher.kv_heads, -1)).flatten(0, 1)
    inside = _tail(grouped, architecture.heads // architecture.kv_heads)
    return {
        # A layer's influence is already a damage, and the sum of what is removed is what counts.
        "layers": float(_lowest(scores["layers"].clamp_min(0)[None], architecture.layers)),
        # The score of a hidden channel is an energy.
        "hidden": float(_lowest(scores["hidden"][None], architecture.hidden)),
        "ffn": shares["ffn"],
        "heads": 1 - (1 - shares["kv_heads"]) * (1 - inside),
    }


def _tail(values_RC: Tensor, keep: int) -> float:
    return float(_lowest(values_RC.square(), keep))


def _lowest(values_RC: Tensor, keep: int) -> Tensor:
    """Mean over rows of the share that the values below the `keep` highest hold."""
    ascending = values_RC.sort(dim=1).values
    gone = ascending[:, : values_RC.shape[1] - keep].sum(1)
    return (gone / ascending.sum(1).clamp_min(1e-30)).mean()


def legal_architectures(
    family: Family, teacher: Architecture, budget: Budget, *, tolerance: float = TOLERANCE
) -> list[Architecture]:
    """Every legal architecture within the tolerance of the budget; else the nearest one alone.

    All depths, hidden sizes and head counts are tried; FFN, the finest axis, takes up what is left of the budget.

    Raises:
        BudgetUnreachable: even the smallest legal model is larger.
    """
    outer = list(_without_ffn(family, teacher, budget))
    smallest = min((budget.cost(a) for a in outer), default=0)
    if not outer or smallest > budget.target * (1 + tolerance):
        raise BudgetUnreachable(
            f"{budget.text} is {budget.target:,}, but the smallest legal model of this family costs {smallest:,}: "
            "the vocabulary and one layer of the smallest legal width remain. Raise the budget."
        )
    nearest, best_gap, found = outer[0], math.inf, []
    for base in outer:
        for candidate in _ffn_options(teacher, base, budget, tolerance):
            gap = abs(budget.cost(candidate) - budget.target) / budget.target
            if gap < best_gap:
                nearest, best_gap = candidate, gap
            if gap <= tolerance:
                found.append(candidate)
    return found or [nearest]


def _without_ffn(family: Family, teacher: Architecture, budget: Budget) -> Iterator[Architecture]:
    """Legal architectures with the smallest FFN (1 neuron)."""
    per_group = teacher.heads // teacher.kv_heads
    step = _alignment(teacher.hidden, 0.02)
    for layers in range(teacher.layers, 0, -1):
        for kv_heads in range(teacher.kv_heads, 0, -1):
            for heads in (kv_heads * size for size in range(per_group, 0, -1)):
                for hidden in {*range(step, teacher.hidden + 1, step), teacher.hidden}:
                    base = teacher.replace(layers=layers, hidden=hidden, ffn=1, heads=heads, kv_heads=kv_heads)
                    if not illegal_cut(family, teacher, base):
                        yield base


def _ffn_options(teacher: Architecture, base: Architecture, budget: Budget, tolerance: float) -> list[Architecture]:
    """The one or two aligned FFN sizes that bring `base` nearest to the budget from both sides."""
    fixed = budget.cost(base.replace(ffn=0))
    per_neuron = budget.cost(base) - fixed
    room = (budget.target - fixed) / per_neuron
    if room < 1:
        return []
    step = next((s for s in ALIGNMENTS if s * per_neuron <= tolerance * budget.target), 1)
    sizes = {int(room // step) * step, int(room // step + 1) * step}
    if abs(teacher.ffn - room) * per_neuron <= tolerance * budget.target:
        sizes.add(teacher.ffn)
    return [base.replace(ffn=size) for size in sorted(sizes) if 1 <= size <= teacher.ffn]


def _alignment(size: int, share: float) -> int:
    """Largest alignment that is at most this share of the size."""
    return next((step for step in ALIGNMENTS if step <= share * size), 1)


def probe_architectures(family: Family, teacher: Architecture, budget: Budget) -> dict[str, Architecture]:
    """Per axis the cut of it alone that comes nearest to the budget, but at least half of the axis stays."""
    probes = {}
    for axis in PROBED_AXES:
        options = [a for a in _single_axis(teacher, axis) if not illegal_cut(family, teacher, a)]
        if options:
            probes[axis] = min(options, key=lambda a: abs(budget.cost(a) - budget.target))
    return probes


def _single_axis(teacher: Architecture, axis: str) -> list[Architecture]:
    if axis == "heads":
        per_group = teacher.heads // teacher.kv_heads
        inside = [teacher.replace(heads=teacher.kv_heads * n) for n in range(math.ceil(per_group / 2), per_group)]
        groups = range(math.ceil(teacher.kv_heads / 2), teacher.kv_heads)
        return inside + [teacher.replace(heads=per_group * n, kv_heads=n) for n in groups]
    size = teacher[axis]
    step = 1 if axis == "layers" else _alignment(size, 0.02)
    return [teacher.replace(**{axis: n}) for n in range(size - step, (size - 1) // 2, -step)]


def search(
    teacher: Checkpoint,
    scores: Scores,
    budget: Budget,
    *,
    calibration: Blocks | None = None,
    heldout: Blocks | None = None,
    candidates: int = 4,
    probe_blocks: int = 8,
    tolerance: float = TOLERANCE,
    repair: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """Legal architectures near the budget, best first.

    Args:
        calibration: text for the repair of probes and candidates; without it and `heldout` nothing is measured, and
            axes are weighed alike.
        heldout: text on which they are compared; must not be used for the final evaluation.
        candidates: how many are built and measured.
        probe_blocks: calibration blocks for each probe and candidate.
    Raises:
        BudgetUnreachable: no legal model is that small.
    """
    family, source = teacher.family, teacher.architecture
    found = legal_architectures(family, source, budget, tolerance=tolerance)
    gap = abs(budget.cost(found[0]) - budget.target) / budget.target
    note = None
    if gap > tolerance:
        note = f"no legal architecture lies within {tolerance:.0%} of {budget.text}; the nearest misses it by {gap:.1%}"
    slopes = dict.fromkeys(PROBED_AXES, 1.0)
    measurer = None
    if calibration is not None and heldout is not None and len(found) > 1 and candidates > 0:
        probes = probe_architectures(family, source, budget)
        total = len(probes) + min(candidates, len(found))
        measurer = _Measurer(teacher, scores, calibration.head(probe_blocks), heldout, repair, total, progress)
        slopes |= {axis: _slope(measurer, scores, source, probe, axis) for axis, probe in probes.items()}
    predicted = [Candidate(a, budget.parameters(a), _damage(scores, source, a, slopes)) for a in found]
    predicted.sort(key=lambda candidate: candidate.predicted_damage)
    if measurer is None:
        return Search(predicted[:100], slopes, len(found), note)
    chosen = _diverse(predicted, candidates)
    measured = [replace(candidate, measured=measurer(candidate.architecture)) for candidate in chosen]
    measured.sort(key=lambda candidate: candidate.measured.loss if candidate.measured else math.inf)
    rest = [candidate for candidate in predicted[:100] if candidate not in chosen]
    return Search([*measured, *rest], slopes, len(found), note)


class _Measurer:
    """Builds, repairs and measures architectures with one teacher in memory."""

    def __init__(
        self,
        teacher: Checkpoint,
        scores: Scores,
        calibration: Blocks,
        heldout: Blocks,
        repair: bool,
        total: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.teacher, self.scores, self.repair = teacher, scores, repair
        self.calibration, self.heldout = calibration, heldout
        self.model = teacher.module(device=hardware.device())
        self.base = quality(self.model, heldout)
        self.done, self.total, self.progress = 0, total, progress

    @torch.no_grad()
    def __call__(self, architecture: Architecture) -> Quality:
        student = cut(self.teacher, self.scores, architecture)
        if self.repair:
            model = repaired(self.teacher, student, self.calibration, teacher_model=self.model)
        else:
            model = hardware.place(build(student, self.teacher.dtype), device=hardware.device())
        self.done += 1
        self.progress(self.done, self.total)
        return quality(model, self.heldout)


def _slope(measurer: _Measurer, scores: Scores, teacher: Architecture, probe: Architecture, axis: str) -> float:
    """Nats per unit of lost share. At least a little: an axis whose probe did no harm is cheap, not free."""
    damage = measurer(probe).loss - measurer.base.loss
    return max(damage, 1e-3) / max(lost_share(scores, teacher, probe)[axis], 1e-6)


def _damage(scores: Scores, teacher: Architecture, target: Architecture, slopes: Mapping[str, float]) -> float:
    return sum(slopes[axis] * share for axis, share in lost_share(scores, teacher, target).items())


def _diverse(ranked: list[Candidate], count: int) -> list[Candidate]:
    """The best, then the best that differ from those already taken by at least 5 % in some axis."""
    chosen: list[Candidate] = []
    for candidate in ranked:
        if len(chosen) == count:
            break
        if all(_differs(candidate.architecture, other.architecture) for other in chosen):
            chosen.append(candidate)
    return chosen or ranked[:count]


def _differs(a: Architecture, b: Architecture) -> bool:
    return any(abs(a[axis] - b[axis]) > 0.05 * b[axis] for axis in AXES)
