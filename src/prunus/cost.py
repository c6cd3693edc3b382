"""Parameters, bytes and FLOPs of an architecture, from the teacher's own list of tensors. Nothing is loaded."""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunus import dims
from prunus.architecture import Architecture
from prunus.families import Family

Layout = Mapping[str, tuple[str, ...]]
"""Tensor name → unit of each dimension, for every tensor of the teacher (tied heads once)."""
Kind = Mapping[str, tuple[str, str]]
"""Part of the model → formulas (see `dims`) of its values, and of those that one token has to do with."""
SLIDING = "sliding_attention"
"""What a config calls a layer whose tokens look back a window only."""


def layout(family: Family, tensors: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    """Units of every tensor, by its shape; the family must cover them all."""
    units = {name: family.units(name, shape) for name, shape in tensors.items()}
    assert all(formulas is not None for formulas in units.values()), "the checkpoint is validated when it is opened"
    return {name: formulas for name, formulas in units.items() if formulas is not None}


def group_of(family: Family, tensor: str, units: tuple[str, ...]) -> str:
    """The part of the model that a tensor belongs to: a branch, embedding, head, norms, vision or buffers."""
    layer, name = family.split(tensor)
    module = name.rpartition(".")[0]
    if name in family.buffers:
        return "buffers"
    if layer is None and name.startswith(family.vision):
        return "vision"
    if layer is None:
        return {family.embedding: "embedding", family.head: "head"}.get(module, "norms")
    owner = next((branch for branch in family.branches if branch.owns(module)), None)
    if owner is None and (
        len(units) > 1 or not name.endswith((".weight", ".bias"))
    ):  # what a branch has beside its projections
        owner = next((branch for branch in family.branches if name.startswith(f"{branch.module}.")), None)
    return owner.name if owner else "norms"


def branch_layers(family: Family, tensors: Layout, ranking: Sequence[int] | None = None) -> dict[str, list[int]]:
    """Branch → the layers that have it, in the order of `ranking` (see `shapes`), of those branches that some have."""
    split = [family.split(name) for name in tensors]
    having = {
        branch.name: {layer for layer, name in split if layer is not None and name.startswith(f"{branch.mark}.")}
        for branch in family.branches
    }
    order = ranking or sorted({layer for layer, _ in split if layer is not None})
    return {name: [layer for layer in order if layer in layers] for name, layers in having.items() if layers}


@dataclass(frozen=True)
class Shapes:
    """A teacher's tensors by their shapes, to count an architecture without building it.

    Attributes:
        outer: outside the layers.
        kinds: the different layers that there are.
        order: kind of each layer, the one that stays longest first.
    """

    outer: Kind
    kinds: tuple[Kind, ...]
    order: tuple[int, ...]

    @functools.cached_property
    def sums(self) -> list[str]:
        """One formula for all parameters outside the layers, and of each kind of layer."""
        kinds = (self.outer, *self.kinds)
        return [" + ".join(whole for part, (whole, _) in kind.items() if part != "buffers") or "0" for kind in kinds]

    @functools.cached_property
    def staying(self) -> list[Counter[int]]:
        """Of each number of layers, how many are of which kind."""
        return [Counter(self.order[:layers]) for layers in range(len(self.order) + 1)]


def shapes(family: Family, tensors: Layout, ranking: Sequence[int] | None = None) -> Shapes:
    """See `Shapes`.

    Args:
        ranking: layers in the order in which they stay (see `selection.ranked_layers`); matters only where they are of
            several kinds and depth is cut. Without it the first ones stay.
    """
    outer: Counter[tuple[str, tuple[str, ...]]] = Counter()
    layers: dict[int, Counter[tuple[str, tuple[str, ...]]]] = defaultdict(Counter)
    for name, units in tensors.items():
        layer = family.split(name)[0]
        (outer if layer is None else layers[layer])[group_of(family, name, units), units] += 1
    different: list[Counter[tuple[str, tuple[str, ...]]]] = []
    for counted in layers.values():
        if counted not in different:
            different.append(counted)
    order = tuple(different.index(layers[layer]) for layer in ranking or sorted(layers))
    return Shapes(_kind(outer), tuple(map(_kind, different)), order)


def _kind(counted: Counter[tuple[str, tuple[str, ...]]]) -> Kind:
    """One formula for all tensors of a part: a search counts a hundred thousand architectures."""
    sums: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for (part, units), number in counted.items():
        product = " * ".join([str(number), *(f"({unit})" for unit in units)])
        whole, active = sums[part]
        whole.append(product)
        active.append(f"{product} * top_k // experts" if units[:1] == ("experts",) and len(units) > 2 else product)
    return {part: (" + ".join(whole), " + ".join(active)) for part, (whole, active) in sums.items()}


def count(shapes: Shapes, architecture: Architecture, *, active: bool = False) -> dict[str, int]:
    """Values of each part.

    Args:
        active: of experts only as many as a token is sent to.
    """
    stay, sizes = shapes.staying[architecture.layers], architecture.plain()
    parts: dict[str, int] = defaultdict(int)
    for kind, number in [(shapes.outer, 1), *((shapes.kinds[place], number) for place, number in stay.items())]:
        for part, formulas in kind.items():
            parts[part] += number * dims.size(formulas[active], sizes)
    return dict(parts)


def total(shapes: Shapes, architecture: Architecture) -> int:
    """Parameters, which `count` tells apart."""
    sizes, (outer, *kinds) = architecture.plain(), shapes.sums
    stay = shapes.staying[architecture.layers]
    return dims.size(outer, sizes) + sum(number * dims.size(kinds[kind], sizes) for kind, number in stay.items())


def parameters_by_group(
    family: Family, tensors: Layout, architecture: Architecture, ranking: Sequence[int] | None = None
) -> dict[str, int]:
    groups = count(shapes(family, tensors, ranking), architecture)
    return {part: size for part, size in groups.items() if part != "buffers"}


def parameters(
    family: Family, tensors: Layout, architecture: Architecture, ranking: Sequence[int] | None = None
) -> int:
    return total(shapes(family, tensors, ranking), architecture)


def at_once(family: Family, layout: Layout, sizes: Architecture) -> int:
    """Parameters that a walk from the disk, or a rank of several, holds: what stands around the layers, and the largest
    of these twice, since dropped layers run behind the one that is fitted to, and ranks gather the next one ahead."""
    counts: Counter[int | None] = Counter()
    for name, units in layout.items():
        counts[family.split(name)[0]] += math.prod(dims.size(unit, sizes) for unit in units)
    around = counts.pop(None, 0)
    return around + min(2 * max(counts.values()), sum(counts.values()))


def flops_per_token(family: Family, shapes: Shapes, architecture: Architecture, *, context: int = 0) -> int:
    """Multiply-adds × 2 of one token's forward pass; attention over `context` earlier tokens included."""
    groups = count(shapes, architecture, active=True)
    head = groups.get("head") or architecture.vocab * architecture.hidden
    attention = attending(shapes, architecture) * _per_earlier_token(architecture) * context
    return 2 * (sum(groups.get(branch.name, 0) for branch in family.branches) + head + attention)


def _per_earlier_token(architecture: Architecture) -> int:
    """Multiply-adds of a layer's scores and of the sum that they weigh; keys and values made of latents differ in
    width."""
    widths = ("nope_dim", "rope_dim", "value_dim")
    if "value_dim" in architecture:
        return architecture.heads * sum(architecture.get(name, 0) for name in widths)
    return 2 * architecture.get("heads", 0) * architecture.get("head_dim", 0)


def kv_bytes_per_token(family: Family, shapes: Shapes, architecture: Architecture, *, bytes_per_value: int = 2) -> int:
    """Of the cache that generation keeps; what Mamba layers keep does not grow with the tokens."""
    layers = attending(shapes, architecture)
    return layers * dims.size(family.cached, architecture) * bytes_per_value if layers else 0


def kv_bytes(
    family: Family,
    shapes: Shapes,
    architecture: Architecture,
    *,
    context: int,
    windows: Sequence[int | None],
    bytes_per_value: int,
) -> int:
    """Of the cache of one sequence of `context` tokens.

    Args:
        windows: see `windows_of`, in the order of `shapes`.
    """
    staying = zip(shapes.order[: architecture.layers], windows, strict=False)
    kept = sum(min(window or context, context) for kind, window in staying if "attention" in shapes.kinds[kind])
    return kept * dims.size(family.cached, architecture) * bytes_per_value if kept else 0


def windows_of(config: object, layers: int, ranking: Sequence[int] | None = None) -> list[int | None]:
    """How many tokens each layer's cache holds at most, as transformers' `DynamicCache` reads it from a config: those
    of its sliding window; None where it has none.

    Args:
        config: of the language model.
        ranking: layers in the order in which they stay (see `shapes`).
    """
    window, kinds = (getattr(config, key, None) for key in ("sliding_window", "layer_types"))
    found = [window if kind == SLIDING else None for kind in kinds or [SLIDING] * layers]
    return [found[layer] for layer in ranking or range(layers)]


def attending(shapes: Shapes, architecture: Architecture) -> int:
    """Layers with attention."""
    having = ["attention" in kind for kind in shapes.kinds]
    return sum(having[kind] for kind in shapes.order[: architecture.layers])
