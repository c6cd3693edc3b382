"""The architectures that a family allows and a budget leaves room for.

All depths, hidden sizes, head and expert counts are tried, in steps where these are too many; the neurons of the FFN,
or of experts, are the finest axis and take up what is left of the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from prunus.architecture import Architecture
from prunus.budget import Budget
from prunus.errors import BudgetUnreachable
from prunus.families import Family
from prunus.selection import illegal_cut

Options = Mapping[str, list[int]]
"""Sizes of each axis; of heads how many a group has."""
PER_GROUP = "per_group"
TOLERANCE = 0.01
"""How far from its budget an architecture may be, as a share of it."""
FILLERS = ("ffn", "expert_ffn", "shared_ffn", "mamba_head_dim")
MOST_COMBINATIONS = 50_000
"""Sizes of an axis are thinned out until no more combinations of them are left to be tried."""
SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Of an axis whose sizes are not all tried."""
ALIGNMENTS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Sizes are kept multiples of the largest of these that still lets the budget be met: fast on tensor cores."""


def legal_architectures(
    family: Family, teacher: Architecture, budget: Budget, *, tolerance: float = TOLERANCE, portable: bool = True
) -> list[Architecture]:
    """Every legal architecture within the tolerance of the budget; else the nearest one alone.

    Where what the budget counts comes in large steps, as layers and groups of a KV cache do, those are near enough of
    which nothing could stay larger, too: half of the cache is 15 layers of three groups, or 22 of two.

    Args:
        portable: only such as llama.cpp and vLLM load too (see `Family.elsewhere`).
    Raises:
        BudgetUnreachable: even the smallest legal model is larger.
    """
    family = family.portable(teacher) if portable else family
    filler = _filler(teacher, budget)
    grid = _grid(filler, family, teacher)

    def filled(options: Options) -> Iterator[Architecture]:
        for base in _without(filler, family, teacher, options):
            yield from _filled(family, filler, teacher, base, budget, tolerance)

    def gap(architecture: Architecture) -> float:
        return abs(budget.use(architecture) - 1)

    def meets(architecture: Architecture) -> bool:
        return gap(architecture) <= tolerance or (
            architecture[filler] == teacher[filler]
            and budget.use(architecture) < 1
            and not _binding_counts(filler, architecture, budget)
            and all(budget.use(larger) > 1 + tolerance for larger in _one_more(family, teacher, grid, architecture))
        )

    # A size that alone goes below the budget is in no architecture that meets it, and would crowd out those that are.
    near = {axis: _near(teacher, budget, axis, sizes, filler, tolerance) for axis, sizes in grid.items()}
    if found := [candidate for candidate in filled(near) if meets(candidate)]:
        return found
    smallest = min(_without(filler, family, teacher, grid), key=budget.use, default=teacher)
    if budget.use(smallest) > 1 + tolerance:
        raise BudgetUnreachable(_too_little(budget, smallest, tolerance))
    return [min(filled(grid), key=gap, default=smallest)]


def _near(
    teacher: Architecture, budget: Budget, axis: str, sizes: list[int], filler: str, tolerance: float
) -> list[int]:
    """Those that an architecture near the budget may have. Where no neurons fill a gap, the next one below, too."""
    enough = [size for size in sizes if budget.use(_sized(teacher, {axis: size})) >= 1 - tolerance]
    coarse = not _binding_counts(filler, teacher, budget)
    return sizes[: len(enough) + 1] if coarse else enough


def _binding_counts(filler: str, architecture: Architecture, budget: Budget) -> bool:
    """Whether the limit that is used up most counts these neurons."""
    return budget.use(architecture.replace(**{filler: 1})) < budget.use(architecture)


def _one_more(
    family: Family, teacher: Architecture, grid: Options, architecture: Architecture
) -> Iterator[Architecture]:
    """The architecture with the next larger legal size of each axis."""
    own = {axis: architecture[axis] for axis in architecture.axes() if axis != "heads"}
    if PER_GROUP in grid:
        own[PER_GROUP] = architecture.heads // architecture.kv_heads
    for axis, sizes in grid.items():
        above = (_sized(teacher, {**own, axis: size}) for size in sorted(sizes) if size > own[axis])
        legal = (larger for larger in above if larger == teacher or not illegal_cut(family, teacher, larger))
        yield from itertools.islice(legal, 1)


def _too_little(budget: Budget, smallest: Architecture, tolerance: float) -> str:
    """Which limits not even the smallest model keeps."""
    missed = [
        f"{limit} is {limit.target:,}, but the smallest legal model of this family costs {least:,}"
        for limit, least in ((limit, budget.cost(limit, smallest)) for limit in budget.limits)
        if least > limit.target * (1 + tolerance)
    ]
    left = "one layer of the smallest legal width, and the vocabulary (prunus vocabulary cuts that)"
    return f"{'; '.join(missed)}: {left}. Raise the budget."


def _filler(teacher: Architecture, budget: Budget) -> str:
    """The kind of neurons that holds the most parameters; of Mamba, which has none, its inner channels."""
    kinds = [axis for axis in FILLERS if axis in teacher.axes()] or ["mamba_heads"]
    return min(kinds, key=lambda axis: budget.parameters(teacher.replace(**{axis: 1})))


def _grid(filler: str, family: Family, teacher: Architecture) -> Options:
    """All sizes that are tried, but for the neurons that fill up."""
    options = {axis: _options(teacher, axis) for axis in teacher.axes() if axis not in (filler, "heads", "top_k")}
    options |= {axis: [teacher[axis]] for axis in family.uncut if axis in options}
    if "heads" in teacher:
        options[PER_GROUP] = list(range(teacher.heads // teacher.kv_heads, 0, -1))
    return options


def _without(filler: str, family: Family, teacher: Architecture, grid: Options) -> Iterator[Architecture]:
    """Legal architectures of these sizes with the fewest neurons of the kind that fills them up."""
    least, options = _least(filler, family, teacher), dict(grid)
    while math.prod(map(len, options.values())) > MOST_COMBINATIONS:
        longest = max(options, key=lambda axis: len(options[axis]))
        options[longest] = options[longest][::2]
    for sizes in itertools.product(*options.values()):
        base = _sized(teacher, {**dict(zip(options, sizes, strict=True)), filler: least})
        if not illegal_cut(family, teacher, base):
            yield base


def _sized(teacher: Architecture, sizes: Mapping[str, int]) -> Architecture:
    """The teacher with these sizes; groups go with their heads."""
    named = dict(sizes)
    if PER_GROUP in named or "kv_heads" in named:
        per_group = named.pop(PER_GROUP, teacher.heads // teacher.kv_heads)
        named["heads"] = named.get("kv_heads", teacher.kv_heads) * per_group
    return teacher.replace(**named)


def _least(axis: str, family: Family, teacher: Architecture) -> int:
    """The smallest legal size of an axis, of which the others are multiples."""
    legal = (s for s in reversed(ALIGNMENTS) if not family.illegal(teacher.replace(**{axis: s})))
    return next(legal, teacher[axis])


def _options(teacher: Architecture, axis: str) -> list[int]:
    """Sizes of an axis that are tried, the teacher's first."""
    size = teacher[axis]
    if axis in ("layers", "kv_heads"):
        return list(range(size, 0, -1))
    if axis == "hidden":
        step = _alignment(size, 0.02)
        return [size, *(n for n in range(size // step * step, 0, -step) if n < size)]
    step = _alignment(size, 0.1)
    return sorted({max(1, round(share * size / step) * step) for share in SHARES} | {size}, reverse=True)


def _filled(
    family: Family, filler: str, teacher: Architecture, base: Architecture, budget: Budget, tolerance: float
) -> list[Architecture]:
    """`base`, which has the fewest, with the one or two aligned numbers of neurons that bring it nearest to the budget
    from both sides."""
    most = teacher[filler]
    # Of all neurons at once: costs are whole numbers, and one neuron may take less than a microsecond.
    fixed, full = (budget.shares(base.replace(**{filler: size})) for size in (0, most))
    each = [(whole - rest) / most for whole, rest in zip(full, fixed, strict=True)]
    if max((rest for rest, per_neuron in zip(fixed, each, strict=True) if not per_neuron), default=0) > 1 + tolerance:
        return []  # a limit that neurons do not help
    room, per_neuron = min(
        (((1 - rest) / per_neuron, per_neuron) for rest, per_neuron in zip(fixed, each, strict=True) if per_neuron),
        default=(math.inf, 0.0),
    )
    if not per_neuron:  # no limit counts them, or none of the layers that stay has any
        return [base.replace(**{filler: most})]
    if room < 1:
        return []
    least = base[filler]
    step = next((s for s in ALIGNMENTS if s * per_neuron <= tolerance and s % least == 0), least)
    sizes = {int(room // step) * step, int(room // step + 1) * step}
    if (room - most) * per_neuron > tolerance or abs(most - room) * per_neuron <= tolerance:
        sizes.add(most)
    filled = [base.replace(**{filler: size}) for size in sorted(sizes) if 1 <= size <= most]
    return [candidate for candidate in filled if not family.illegal(candidate)]


def _alignment(size: int, share: float) -> int:
    """Largest alignment that is at most this share of the size."""
    return next((step for step in ALIGNMENTS if step <= share * size), 1)


def cuts_of(family: Family, teacher: Architecture, axis: str) -> list[Architecture]:
    """The teacher with less of one axis, down to about half: of it alone, or where the family ties it to another one,
    of both alike."""
    alone = single_axis(teacher, axis)
    legal = [cut for cut in alone if not illegal_cut(family, teacher, cut)]
    return legal or [cut for cut in _with_another(teacher, axis) if not illegal_cut(family, teacher, cut)]


def _with_another(teacher: Architecture, axis: str) -> Iterator[Architecture]:
    others = [other for other in teacher.axes() if other != axis]
    for one, follower in itertools.chain(((axis, other) for other in others), ((other, axis) for other in others)):
        for cut in single_axis(teacher, one):
            size, rest = divmod(teacher[follower] * cut[one], teacher[one])
            if not rest:
                yield cut.replace(**{follower: size})


def single_axis(teacher: Architecture, axis: str) -> list[Architecture]:
    """The teacher with one axis smaller, down to about half."""
    if axis == "heads":
        per_group = teacher.heads // teacher.kv_heads
        inside = [teacher.replace(heads=teacher.kv_heads * n) for n in range(math.ceil(per_group / 2), per_group)]
        groups = range(math.ceil(teacher.kv_heads / 2), teacher.kv_heads)
        return inside + [teacher.replace(heads=per_group * n, kv_heads=n) for n in groups]
    size = teacher[axis]
    step = 1 if axis == "layers" else _alignment(size, 0.02)
    return [teacher.replace(**{axis: n}) for n in range(size - step, (size - 1) // 2, -step)]
