"""Parameters, bytes and FLOPs of an architecture, from the teacher's own list of tensors. Nothing is loaded."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from prunus import dims
from prunus.architecture import Architecture
from prunus.families import Family

Layout = Mapping[str, tuple[str, ...]]
"""Tensor name → unit of each dimension, for every tensor of the teacher (tied heads once)."""


def layout(family: Family, tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Units of every tensor; the family must cover them all."""
    units = {name: family.units(name) for name in tensors}
    assert all(units.values()), "the checkpoint is validated when it is opened"
    return {name: formulas for name, formulas in units.items() if formulas}


def group_of(family: Family, tensor: str) -> str:
    """The part of the model that a tensor belongs to: embedding, head, attention, ffn, norms."""
    layer, name = family.split(tensor)
    if layer is None:
        parts = {family.embedding: "embedding", family.head: "head"}
        return parts.get(name.rsplit(".", 1)[0], "norms")
    for branch in family.branches:
        if name.rsplit(".", 1)[0] in (*branch.reads, branch.write):
            return branch.name
    return "norms"


def shape_counts(family: Family, tensors: Layout) -> Counter[tuple[str, bool, tuple[str, ...]]]:
    """How many tensors of each (part, in a layer, units) there are outside the layers and in one layer.

    Layers are uniform: the tensors of layer 0 stand for all.
    """
    placed = ((name, family.split(name)[0], units) for name, units in tensors.items())
    return Counter((group_of(family, name), layer == 0, units) for name, layer, units in placed if layer in (None, 0))


def count(shapes: Counter[tuple[str, bool, tuple[str, ...]]], architecture: Architecture) -> dict[str, int]:
    """Parameters of each part."""
    parts: dict[str, int] = defaultdict(int)
    for (part, in_layer, units), number in shapes.items():
        size = math.prod(dims.size(unit, architecture) for unit in units)
        parts[part] += number * size * (architecture.layers if in_layer else 1)
    return dict(parts)


def parameters_by_group(family: Family, tensors: Layout, architecture: Architecture) -> dict[str, int]:
    return count(shape_counts(family, tensors), architecture)


def parameters(family: Family, tensors: Layout, architecture: Architecture) -> int:
    return sum(parameters_by_group(family, tensors, architecture).values())


def flops_per_token(family: Family, tensors: Layout, architecture: Architecture, *, context: int = 0) -> int:
    """Multiply-adds × 2 of one token's forward pass; attention over `context` earlier tokens included."""
    groups = parameters_by_group(family, tensors, architecture)
    head = groups.get("head") or architecture.vocab * architecture.hidden
    attention = 2 * architecture.layers * architecture.heads * architecture.head_dim * context
    return 2 * (groups["attention"] + groups["ffn"] + head + attention)


def kv_bytes_per_token(architecture: Architecture, *, bytes_per_value: int = 2) -> int:
    return 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * bytes_per_value
