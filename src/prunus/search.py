"""Scores + cost + budget → legal candidate architectures, ranked by predicted damage; the best few built and measured.

The prediction: what an axis loses is the share of its score energy that is cut away, and what that costs in nats is
probed once per axis, by a cut of that axis alone, repaired and measured. A ranking before any retraining is a first
guess (Minitron, arXiv:2407.14679, sec. 4: rankings move until some 300 steps in), which is why several are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus import hardware, memory
from prunus.architecture import Architecture
from prunus.budget import Budget
from prunus.checkpoint import Checkpoint
from prunus.evaluate import Quality, quality
from prunus.families import Family
from prunus.prune import Student, build, cut, repaired
from prunus.repair import DAMPING
from prunus.scores import Scores
from prunus.source import in_memory, on_disk
from prunus.space import TOLERANCE, cuts_of, legal_architectures
from prunus.text import Blocks


@dataclass(frozen=True)
class Standing:
    """How far a candidate came.

    Attributes:
        tokens: that it was trained on when it was measured, ascending; the first is 0.
        losses: on held-out text then, nats per token.
    """

    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, float]:
        """Ascending: who was trained longer is ahead, then who is better."""
        return -len(self.losses), self.losses[-1]


@dataclass(frozen=True)
class Candidate:
    """An architecture near the budget.

    Attributes:
        parameters: of the whole model, a tied head counted once.
        predicted_damage: nats per token above the teacher, from scores and probes; NaN where nobody asked.
        measured: on held-out text after repair, without training; None if it was not built.
        trained: how it did in a tournament, if it took part in one.
    """

    architecture: Architecture
    parameters: int
    predicted_damage: float
    measured: Quality | None = None
    trained: Standing | None = None


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        candidates: best first; measured ones ahead of those that were only predicted.
        probes: axis → nats per token of a full loss of that axis, as extrapolated from its probe.
        considered: legal architectures within the tolerance.
        note: why the budget was missed by more than the tolerance, if so.
        uncut: what is cut, measured on the same text; None if nothing was measured.
    """

    candidates: list[Candidate]
    probes: Mapping[str, float]
    considered: int
    note: str | None
    uncut: Quality | None = None

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def ordered(self, standings: Mapping[int, Standing]) -> Search:
        """The candidates of these numbers in the order of a tournament, ahead of the others."""
        first = [replace(self.candidates[number], trained=standing) for number, standing in standings.items()]
        rest = [candidate for number, candidate in enumerate(self.candidates) if number not in standings]
        return replace(self, candidates=[*first, *rest])

    def with_best(self, architecture: Architecture, budget: Budget) -> Search:
        """An architecture ahead of the others; if it is none of the candidates, nothing was predicted of it."""
        unknown = Candidate(architecture, budget.parameters(architecture), math.nan)
        first = next((each for each in self.candidates if each.architecture == architecture), unknown)
        return replace(self, candidates=[first, *(each for each in self.candidates if each is not first)])


def lost_curves(scores: Scores, teacher: Architecture) -> dict[str, list[float]]:
    """Axis → by how many parts stay, 0 to all, the share of the axis' score energy (Σ s²) that the best selection of
    them cuts away, in [0, 1]. Of heads: by how many stay in each group.
    """
    squares = {axis: _ranked(scores[axis]).square() for axis in _plain_axes(teacher)}
    # A layer's influence is already a damage, and the sum of what is removed is what counts.
    squares["layers"] = scores["layers"].clamp_min(0)[None]
    # The score of a hidden channel is a sum of shares.
    squares["hidden"] = scores["hidden"][None]
    if "heads" in scores.axes:
        squares["kv_heads"] = _ranked(scores["kv_heads"]).square()
        squares["heads"] = _ranked(scores["heads"].unflatten(-1, (teacher.kv_heads, -1))).square()
    return {axis: _lowest(values) for axis, values in squares.items()}


def lost_share(curves: Mapping[str, list[float]], architecture: Architecture) -> dict[str, float]:
    """Axis → what it loses, in [0, 1].

    Heads are ranked within their groups, so the axis "heads" covers both heads and groups.

    Args:
        curves: see `lost_curves`.
    """
    shares = {axis: curve[architecture[axis]] for axis, curve in curves.items() if axis not in ("heads", "kv_heads")}
    if "heads" in curves:
        groups = curves["kv_heads"][architecture.kv_heads]
        inside = curves["heads"][architecture.heads // architecture.kv_heads]
        shares["heads"] = 1 - (1 - groups) * (1 - inside)
    return shares


def probed_axes(teacher: Architecture) -> list[str]:
    """The axes whose damage is weighed; heads and their groups are one."""
    return ["layers", "hidden", *(["heads"] if "heads" in teacher else []), *_plain_axes(teacher)]


def _plain_axes(teacher: Architecture) -> list[str]:
    """Those whose parts are independent of each other."""
    return [axis for axis in teacher.axes() if axis not in ("layers", "hidden", "heads", "kv_heads", "top_k")]


def _ranked(scores: Tensor) -> Tensor:
    """[rows, C] of scores whose last dimension is ranked, without those of layers that have no such part: zeros."""
    rows = scores.flatten(0, -2)
    return rows[rows.abs().amax(1) > 0]


def _lowest(values_RC: Tensor) -> list[float]:
    """By how many of the highest stay, 0 to C: mean over rows of the share that the others hold."""
    gone = F.pad(values_RC.double().sort(dim=1).values.cumsum(1), (1, 0))  # by how many leave
    curve: list[float] = (gone / gone[:, -1:].clamp_min(1e-30)).mean(0).nan_to_num().flip(0).tolist()
    return curve


def probe_architectures(family: Family, teacher: Architecture, budget: Budget) -> dict[str, Architecture]:
    """Per axis the cut of it (see `cuts_of`) that comes nearest to the budget, but at least half of the axis stays.

    Of several limits all count: to most cuts the one that is used up most is the same.
    """
    found = {axis: cuts_of(family, teacher, axis) for axis in probed_axes(teacher)}
    return {
        axis: min(cuts, key=lambda cut: sum(abs(share - 1) for share in budget.shares(cut)))
        for axis, cuts in found.items()
        if cuts
    }


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
    portable: bool = True,
    repair: bool = True,
    norm_correction: bool = True,
    head_residuals: bool = False,
    damping: float = DAMPING,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """Legal architectures near the budget, best first.

    Args:
        calibration: text for the repair of probes and candidates; without it and `heldout` nothing is measured, and
            axes are weighed alike.
        heldout: text on which they are compared; must not be used for the final evaluation.
        candidates: how many are built and measured.
        probe_blocks: calibration blocks for each probe and candidate.
        tolerance, portable: see `space.legal_architectures`.
        norm_correction, head_residuals, damping: how they are cut and repaired, see `prune.prune`.
    Raises:
        BudgetUnreachable: no legal model is that small.
        DoesNotFit: the teacher and a repaired student would take more memory than is free.
    """
    family, source = teacher.family, teacher.architecture
    found = legal_architectures(family, source, budget, tolerance=tolerance, portable=portable)
    gap = min(abs(budget.use(each) - 1) for each in found)
    note = None
    if gap > tolerance:
        note = f"no legal architecture lies within {tolerance:.0%} of {budget}; the nearest misses it by {gap:.1%}"
    curves = lost_curves(scores, source)
    slopes = dict.fromkeys(probed_axes(source), 1.0)
    measurer = None
    if calibration is not None and heldout is not None and len(found) > 1 and candidates > 0:
        probes = probe_architectures(family, source, budget)
        total = len(set(probes.values())) + min(candidates, len(found))
        text = calibration.head(probe_blocks)
        fitted = len(text) if repair else 0
        built = [*probes.values(), found[0]]
        fits = memory.check_search(teacher, built, blocks=fitted, block_size=text.block_size)
        sliced = partial(cut, teacher, scores, norm_correction=norm_correction, head_residuals=head_residuals)
        measurer = _Measurer(
            teacher, sliced, text, heldout, damping if repair else None, fits.streamed, total, progress
        )
        losses = {probe: measurer(probe).loss for probe in dict.fromkeys(probes.values())}
        slopes |= {
            axis: _slope(losses[probe] - measurer.base.loss, lost_share(curves, probe))
            for axis, probe in probes.items()
        }
    predicted = [Candidate(a, budget.parameters(a), _damage(lost_share(curves, a), slopes)) for a in found]
    predicted.sort(key=lambda candidate: candidate.predicted_damage)
    if measurer is None:
        return Search(predicted[:100], slopes, len(found), note)
    chosen = _diverse(predicted, candidates)
    measured = [replace(candidate, measured=measurer(candidate.architecture)) for candidate in chosen]
    measured.sort(key=lambda candidate: candidate.measured.loss if candidate.measured else math.inf)
    rest = [candidate for candidate in predicted[:100] if candidate not in chosen]
    return Search([*measured, *rest], slopes, len(found), note, measurer.base)


class _Measurer:
    """Builds, repairs and measures architectures with one teacher, in memory or `streamed`; without damping, nothing is
    repaired."""

    def __init__(
        self,
        teacher: Checkpoint,
        cut: Callable[[Architecture], Student],
        calibration: Blocks,
        heldout: Blocks,
        damping: float | None,
        streamed: bool,
        total: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.teacher, self.cut, self.damping = teacher, cut, damping
        self.calibration, self.heldout = calibration, heldout
        # Weights are fitted in the teacher's own type; to compare, the one that the machine is fastest in will do.
        self.dtype, dtype, device = hardware.fast_dtype(teacher.dtype), hardware.compute_dtype(), hardware.device()
        judged = teacher.module(dtype, device)
        self.base = quality(judged, heldout)
        if streamed:
            self.source = on_disk(teacher)
        else:
            self.source = in_memory(judged if self.dtype == dtype else teacher.module(self.dtype, device))
        self.done, self.total, self.progress = 0, total, progress

    @torch.no_grad()
    def __call__(self, architecture: Architecture) -> Quality:
        student = self.cut(architecture)
        if self.damping is not None:
            model = repaired(self.teacher, student, self.calibration, source=self.source, damping=self.damping)
        else:
            model = hardware.place(build(student, self.dtype), device=hardware.device())
        self.done += 1
        self.progress(self.done, self.total)
        return quality(hardware.place(model, dtype=hardware.compute_dtype()), self.heldout)


def _slope(damage: float, lost: Mapping[str, float]) -> float:
    """Nats per unit of lost share, alike for axes that are tied to each other. At least a little: an axis whose probe
    did no harm is cheap, not free."""
    return max(damage, 1e-3) / max(sum(lost.values()), 1e-6)


def _damage(lost: Mapping[str, float], slopes: Mapping[str, float]) -> float:
    return sum(slopes[axis] * share for axis, share in lost.items())


def _diverse(ranked: list[Candidate], count: int) -> list[Candidate]:
    """The best, then the best that differ from those already taken by at least 5 % in some axis."""
    chosen: list[Candidate] = []
    for candidate in ranked:
        if len(chosen) == count:
            break
        if all(_differs(candidate.architecture, other.architecture) for other in chosen):
            chosen.append(candidate)
    return chosen


def _differs(a: Architecture, b: Architecture) -> bool:
    return any(abs(a[axis] - b[axis]) > 0.05 * b[axis] for axis in a.axes())
