"""Squared norms of weights: what scores without text are made of, and the part of others that text does not change.

Shapes: E experts, O outputs and K inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus import dims, experts
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.weights import Parts

WEIGHED_AXES = (
    *("heads", "kv_heads", "ffn", "shared_ffn", "experts", "q_rank", "kv_rank"),
    *("linear_heads", "mamba_heads", "mamba_head_dim", "state"),
)
HEADS = ("heads", "mamba_heads", "linear_heads")
"""Axes of what a write reads that are heads, not neurons."""


def weight_norms(teacher: Checkpoint) -> dict[str, Tensor]:
    """Squared norms of the weights of each part of each axis, and of what neurons of experts write (`Statistics`)."""
    family, sizes = teacher.family, teacher.architecture
    norms = {f"weight/{axis}": torch.zeros(sizes.layers, sizes[axis]) for axis in WEIGHED_AXES if axis in sizes}
    norms["weight/hidden"] = torch.zeros(sizes.hidden)
    if "expert_ffn" in sizes:
        shape = (sizes.layers, sizes.experts, sizes.expert_ffn)
        norms |= {f"{kind}/expert_ffn": torch.zeros(shape) for kind in ("weight", "write")}
    for name, tensor in teacher.tensors():
        formulas, (layer, local) = teacher.layout[name], family.split(name)
        if len(formulas) == 2:
            _add_matrix(norms, _squares(tensor), formulas, layer, sizes)
        elif len(formulas) == 3 and formulas[0] == "experts" and layer is not None:
            for rows, part in tensor.numbered():
                _add_experts(norms, part, formulas, layer, rows, sizes, writes=local.endswith(experts.WRITE))
    return norms


def _add_matrix(
    norms: Mapping[str, Tensor],
    squares: tuple[Tensor, Tensor],
    formulas: tuple[str, ...],
    layer: int | None,
    sizes: Architecture,
) -> None:
    for along, formula in zip(squares, formulas, strict=True):
        if formula == "hidden":
            norms["weight/hidden"].add_(along)
        names = dims.names(formula)
        for axis in names & set(WEIGHED_AXES) | ({"kv_heads"} if "heads" in names else set()):
            if layer is not None:
                owner = _owner(formula, sizes, axis)
                norms[f"weight/{axis}"][layer].index_add_(0, owner[owner >= 0], along[owner >= 0])


def _owner(formula: str, sizes: Architecture, axis: str) -> Tensor:
    """`dims.owner`; a query head is a part of the group that it leaves with."""
    owner = dims.owner(formula, sizes, axis)
    if axis != "kv_heads":
        return owner
    heads = dims.owner(formula, sizes, "heads")
    in_group = heads.div(sizes.heads // sizes.kv_heads, rounding_mode="floor")  # of −1, none: −1
    return torch.where(owner < 0, in_group, owner)


def _add_experts(
    norms: Mapping[str, Tensor],
    part: Tensor,
    formulas: tuple[str, ...],
    layer: int,
    rows: slice,
    sizes: Architecture,
    *,
    writes: bool,
) -> None:
    """Of some experts' weights, [E, O, K] or [E, K, O]."""
    squares = part.to(torch.float32, copy=True).square_()
    norms["weight/experts"][layer, rows] += squares.sum((1, 2))
    for dim, formula in enumerate(formulas[1:], start=1):
        along = squares.sum(3 - dim)
        if formula == "hidden":
            norms["weight/hidden"].add_(along.sum(0))
            continue
        neurons = torch.zeros(len(along), sizes.expert_ffn)
        neurons.index_add_(1, dims.owner(formula, sizes, "expert_ffn"), along)
        norms["weight/expert_ffn"][layer, rows] += neurons
        if writes:
            norms["write/expert_ffn"][layer, rows] += neurons


def _squares(tensor: Parts) -> tuple[Tensor, Tensor]:
    """Squared norms of a matrix's rows, and of its columns."""
    rows, columns = (torch.zeros(size) for size in tensor.shape)
    for place, part in tensor.numbered():
        squares = part.to(torch.float32, copy=True).square_()
        rows[place] = squares.sum(1)
        columns += squares.sum(0)
    return rows, columns
