"""Which parts of the teacher a student keeps: legality of a cut, and the choice by score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus import dims
from prunus.architecture import Architecture
from prunus.errors import BudgetUnreachable
from prunus.families import Family
from prunus.scores import Scores


@dataclass(frozen=True)
class Kept:
    """Which parts of the teacher the student keeps, as ascending indices.

    Attributes:
        layers: [L′].
        hidden: [H′].
        inner: axis inside the layers → one list per kept layer.
    """

    layers: list[int]
    hidden: list[int]
    inner: Mapping[str, list[list[int]]]

    def index(self, formula: str, layer: int, teacher: Mapping[str, int]) -> Tensor | None:
        """Kept positions along a weight dimension (see `dims`), in student layer `layer`; None keeps all.

        Args:
            teacher: sizes before the cut.
        """

        def chosen(axis: str) -> Tensor | None:
            if axis == "hidden":
                return torch.tensor(self.hidden)
            return torch.tensor(self.inner[axis][layer]) if axis in self.inner else None

        return dims.index(formula, teacher, chosen)


def illegal_cut(family: Family, teacher: Architecture, target: Architecture) -> list[str]:
    """Why `target` cannot be cut out of `teacher`; empty if it can."""
    reasons = [
        f"{axis}={size} is larger than the teacher's {teacher[axis]}"
        for axis, size in target.axes().items()
        if size > teacher[axis]
    ]
    reasons += family.illegal(target)
    if not reasons and target.heads // target.kv_heads > teacher.heads // teacher.kv_heads:
        reasons.append(
            f"{target.heads} heads in {target.kv_heads} groups need {target.heads // target.kv_heads} heads per group, "
            f"but the teacher's groups have {teacher.heads // teacher.kv_heads}"
        )
    return reasons


def check_legal(family: Family, teacher: Architecture, target: Architecture) -> None:
    """Raises BudgetUnreachable, with every reason, if `target` cannot be cut out of `teacher`."""
    if reasons := illegal_cut(family, teacher, target):
        raise BudgetUnreachable(f"architecture {target} is not legal for {family.model_type}: {'; '.join(reasons)}")


def select(scores: Scores, teacher: Architecture, target: Architecture) -> Kept:
    """Keep what scores highest; query heads within their key-value group, so that groups stay equal."""
    layers = _top(scores["layers"], target.layers)
    per_group = teacher.heads // teacher.kv_heads
    kv_heads = [_top(scores["kv_heads"][layer], target.kv_heads) for layer in layers]
    heads = [
        [
            group * per_group + head
            for group in groups
            for head in _top(
                scores["heads"][layer].view(teacher.kv_heads, per_group)[group], target.heads // target.kv_heads
            )
        ]
        for layer, groups in zip(layers, kv_heads, strict=True)
    ]
    ffn = [_top(scores["ffn"][layer], target.ffn) for layer in layers]
    inner = {"ffn": ffn, "heads": heads, "kv_heads": kv_heads}
    return Kept(layers, _top(scores["hidden"], target.hidden), inner)


def _top(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; of equals the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())
