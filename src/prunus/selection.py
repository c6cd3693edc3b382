"""Which parts of the teacher a student keeps: legality of a cut, and the choice by score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus import dims
from prunus.architecture import Architecture
from prunus.errors import BudgetUnreachable
from prunus.families import Family
from prunus.families.family import FIRST_LAYERS, FOLDED, LAYER_PERIOD
from prunus.scores import Scores

PLAIN_AXES = ("ffn", "shared_ffn", "q_rank", "kv_rank", "mamba_head_dim", "state", "linear_heads")
"""Axes of a layer whose parts are chosen one by one."""


@dataclass(frozen=True)
class Kept:
    """Which parts of the teacher the student keeps, as ascending indices.

    Attributes:
        layers: [L′].
        hidden: [H′].
        inner: axis inside the layers → one list per kept layer; of "expert_ffn" in it one list per kept expert.
    """

    layers: list[int]
    hidden: list[int]
    inner: Mapping[str, list[Any]]

    def index(self, formula: str, layer: int, teacher: Mapping[str, int]) -> Tensor | None:
        """Kept positions along a weight dimension (see `dims`), in student layer `layer`; None keeps all. Where they
        differ from expert to expert, one row for each that is kept.

        Args:
            teacher: sizes before the cut.
        """

        def chosen(axis: str) -> Tensor | None:
            if axis == "hidden":
                return torch.tensor(self.hidden)
            return torch.tensor(self.inner[axis][layer]) if axis in self.inner else None

        if "expert_ffn" not in dims.names(formula):
            return dims.index(formula, teacher, chosen)
        rows = self.inner["expert_ffn"][layer]
        found = [dims.index(formula, teacher, {"expert_ffn": torch.tensor(row)}.get) for row in rows]
        return torch.stack([index for index in found if index is not None])


def illegal_cut(family: Family, teacher: Architecture, target: Architecture) -> list[str]:
    """Why `target` cannot be cut out of `teacher`; empty if it can."""
    reasons = [
        f"{axis}={size} is larger than the teacher's {teacher[axis]}"
        for axis, size in target.axes().items()
        if size > teacher[axis]
    ]
    reasons += [
        f"{axis} of {family.model_type} cannot be cut: {why}"
        for axis, why in family.uncut.items()
        if axis in target and target[axis] < teacher[axis]
    ]
    reasons += family.illegal(target)
    if (teacher.layers - target.layers) % teacher.get(LAYER_PERIOD, 1):
        reasons.append(
            f"layers of {family.model_type} leave {teacher[LAYER_PERIOD]} at a time, because their number says which "
            "kind they are of"
        )
    if not reasons and "heads" in target and target.heads // target.kv_heads > teacher.heads // teacher.kv_heads:
        reasons.append(
            f"{target.heads} heads in {target.kv_heads} groups need {target.heads // target.kv_heads} heads per group, "
            f"but the teacher's groups have {teacher.heads // teacher.kv_heads}"
        )
    return reasons


def check_legal(family: Family, teacher: Architecture, target: Architecture) -> None:
    """Raises BudgetUnreachable, with every reason, if `target` cannot be cut out of `teacher`."""
    if reasons := illegal_cut(family, teacher, target):
        raise BudgetUnreachable(f"architecture {target} is not legal for {family.model_type}: {'; '.join(reasons)}")


def ranked_layers(scores: Scores, teacher: Architecture) -> list[int]:
    """Layers in the order in which they stay; of equals the first. Before all others those first ones that must stay.
    Where only some have attention one of these stays to the end: transformers' cache counts tokens by it."""
    if LAYER_PERIOD in teacher:
        return _ranked_runs(scores["layers"], teacher[LAYER_PERIOD])
    attends = (scores["heads"] != 0).any(1) if "heads" in scores.axes else None
    ranks, first_ones = scores["layers"].clone(), teacher.get(FIRST_LAYERS, 0)
    ranks[:first_ones] = math.inf
    if FOLDED in teacher and attends is not None:  # an FFN is no less than the attention that it stands behind
        more = torch.nextafter(ranks, torch.tensor(math.inf))
        ranks[1:] = torch.where(attends[:-1] & ~attends[1:], torch.maximum(ranks[1:], more[:-1]), ranks[1:])
    order: list[int] = torch.argsort(ranks, descending=True, stable=True).tolist()
    if attends is not None:
        first = next((layer for layer in order if attends[layer]), order[0])
        if not attends.all():
            order = [first, *(layer for layer in order if layer != first)]
    return order


def _ranked_runs(scores_L: Tensor, period: int) -> list[int]:
    """The same where runs of `period` layers leave together, each time the one of lowest score. Those behind move up by
    a whole period, so that each layer stays of its kind; the first ones of a period stay in front of the others."""
    left, gone = list(range(len(scores_L))), list[int]()
    while left:
        starts = range(max(1, len(left) - period + 1))
        start = min(starts, key=lambda start: float(scores_L[left[start : start + period]].sum()))
        gone = [*left[start : start + period], *gone]
        del left[start : start + period]
    return gone


def select(scores: Scores, teacher: Architecture, target: Architecture) -> Kept:
    """Keep what scores highest; query heads within their key-value group, and experts within the router's groups, so
    that these stay equal."""
    layers = sorted(ranked_layers(scores, teacher)[: target.layers])
    plain = [axis for axis in PLAIN_AXES if axis in scores.axes]
    inner: dict[str, list[Any]] = {
        axis: [_top(scores[axis][layer], target[axis]) for layer in layers] for axis in plain
    }
    if "heads" in scores.axes:
        inner |= _heads(scores, layers, teacher, target)
    if "mamba_heads" in scores.axes:
        groups = teacher.mamba_groups
        per_group, keep = teacher.mamba_heads // groups, target.mamba_heads // groups
        inner["mamba_heads"] = [
            _grouped(scores["mamba_heads"][layer], range(groups), per_group, keep) for layer in layers
        ]
    if "experts" in scores.axes:
        inner |= _experts(scores, layers, teacher, target)
    return Kept(layers, _top(scores["hidden"], target.hidden), inner)


def _heads(scores: Scores, layers: list[int], teacher: Architecture, target: Architecture) -> dict[str, list[Any]]:
    per_group, keep = teacher.heads // teacher.kv_heads, target.heads // target.kv_heads
    groups = [_top(scores["kv_heads"][layer], target.kv_heads) for layer in layers]
    heads = [
        _grouped(scores["heads"][layer], chosen, per_group, keep) for layer, chosen in zip(layers, groups, strict=True)
    ]
    return {"heads": heads, "kv_heads": groups}


def _experts(scores: Scores, layers: list[int], teacher: Architecture, target: Architecture) -> dict[str, list[Any]]:
    groups = teacher.get("expert_groups", 1)
    per_group, keep = teacher.experts // groups, target.experts // groups
    experts = [_grouped(scores["experts"][layer], range(groups), per_group, keep) for layer in layers]
    neurons = [
        [_top(scores["expert_ffn"][layer, expert], target.expert_ffn) for expert in chosen]
        for layer, chosen in zip(layers, experts, strict=True)
    ]
    return {"experts": experts, "expert_ffn": neurons}


def _grouped(scores: Tensor, groups: Iterable[int], per_group: int, keep: int) -> list[int]:
    """The `keep` highest of each group, as indices among all."""
    table = scores.view(-1, per_group)
    return [group * per_group + place for group in groups for place in _top(table[group], keep)]


def _top(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; of equals the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())
