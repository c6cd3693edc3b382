"""A large cut in rounds, with training between: how many, and the recipe of the larger student that it leads over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from prunus import recipe as recipes
from prunus.budget import LIMITS, parse_budget
from prunus.checkpoint import Checkpoint
from prunus.recipe import Recipe

LARGEST_CUT = 1 / 3
"""Share of the parameters that one cut takes at most; more goes in rounds (Minitron, arXiv:2407.14679)."""
ROUNDING = 0.01
"""Of a number of rounds: 0.9x to 0.4x is two cuts of a third, though the parameters miss that by a few."""


@dataclass(frozen=True)
class Rounds:
    """Of equal shares.

    Attributes:
        count: cuts, each with its training.
        larger: parameters at the end of the last but one.
    """

    count: int = 1
    larger: int = 0


def rounds(recipe: Recipe, first: Checkpoint, teacher: Checkpoint) -> Rounds:
    """Those that lead to the parameters asked for.

    Args:
        first: what the first of them cuts.
        teacher: what shares are shares of.
    """
    if not recipe.rounds or recipe.params is None:
        return Rounds()
    (limit,) = parse_budget(teacher, params=recipe.params).limits
    if limit.target >= first.parameters:
        return Rounds()  # it is another limit that the first does not keep
    share = limit.target / first.parameters
    count = max(1, math.ceil(math.log(share) / math.log(1 - LARGEST_CUT) - ROUNDING))
    return Rounds(count, round(limit.target / share ** (1 / count)))


def recipe_of_larger(recipe: Recipe, there: Rounds, *, tokens: int, to: Path) -> Recipe | None:
    """The recipe of the round before the last, for a run of its own that ends with its training; None of a single one.

    Args:
        tokens: that all rounds share.
        to: folder of that run.
    """
    if there.count == 1:
        return None
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in LIMITS}
    changes = {
        "params": str(there.larger),
        "to": str(to),
        "distill.tokens": tokens * (there.count - 1) // there.count,
        "distill.seed": recipe.distill.seed + 1,
        "baseline": False,
        "stop_after": "distill",
    }
    return recipes.parse(recipes.override(values, changes), source=recipe.to or "the recipe")
