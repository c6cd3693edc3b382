"""Several sizes of one teacher behind one command: which runs these are, in what order, and the page of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus import recipe as recipes
from prunus import results
from prunus.budget import parse_budget
from prunus.checkpoint import load
from prunus.recipe import STAGES, Recipe
from prunus.report import write_family
from prunus.run import OUTPUTS, Run, read_json, write_json
from prunus.space import legal_architectures

PAGE = "report.html"
AGAIN = ".again.json"
"""A stage that is done again for every size, and the sizes that had it, until all have."""


def members(recipe: Recipe) -> list[Recipe]:
    """A recipe for each size, in a folder of its own: the largest first, every other cut out of the one before it.

    A larger one is trained however early the run is to stop, unless it is the last.

    Raises:
        BadRecipe, BudgetUnreachable: a size that the teacher cannot have.
    """
    teacher, values = load(recipe.model, uneven=recipe.uneven), recipe.model_dump(mode="json")
    budgets = {size: parse_budget(teacher, params=size) for size in recipe.sizes}
    for budget in budgets.values():  # the smallest would be refused after hours only
        legal_architectures(teacher.family, teacher.architecture, budget, **recipe.search.space())
    parameters = {size: budget.limits[0].target for size, budget in budgets.items()}
    found: list[Recipe] = []
    for size in sorted(parameters, key=lambda size: parameters[size], reverse=True):
        changes: dict[str, Any] = {"params": size, "to": str(Path(recipe.to) / size)}
        if found:
            changes["start"] = str(Path(found[-1].to) / OUTPUTS["distill"][-1])
        found.append(recipes.parse(recipes.override(values, changes), source=recipe.to))
    early = STAGES.index(recipe.stop_after) < STAGES.index("distill")
    others = [each.model_copy(update={"stop_after": "distill"}) if early else each for each in found[:-1]]
    return [*others, found[-1]]


def had_again(root: Path, stage: str | None) -> list[str]:
    """Sizes of which a killed command did this stage again already. What another command left of that is forgotten."""
    file = root / AGAIN
    found = read_json(file) if file.is_file() else {}
    if found.get("stage") == stage:
        return list(found.get("sizes", []))
    file.unlink(missing_ok=True)
    return []


def note_again(root: Path, stage: str | None, sizes: Sequence[str], *, of: int) -> None:
    """Args: `of` how many sizes there are."""
    if stage is None or len(sizes) == of:
        (root / AGAIN).unlink(missing_ok=True)
    else:
        write_json(root / AGAIN, {"stage": stage, "sizes": list(sizes)})


def write_page(runs: Sequence[Run], root: Path) -> None:
    """What all sizes came to, as JSON and for a reader."""
    family = results.family(runs)
    write_json(root / results.FAMILY, family)
    write_family(family, root / PAGE)


def forget_page(root: Path) -> None:
    """Where one of the runs has no report any more, that of all shows earlier results."""
    for name in (results.FAMILY, PAGE):
        (root / name).unlink(missing_ok=True)
