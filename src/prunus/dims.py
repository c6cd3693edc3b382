"""What one dimension of a weight is made of, written as a formula of sizes, and what stays of it when they are cut.

    "hidden"                                channels of the residual stream
    "heads*head_dim"                        head after head, head_dim values each
    "heads*3*head_dim"                      of each head its query, key and value (GPT-NeoX)
    "heads*head_dim + 2*kv_heads*head_dim"  all queries, all keys, all values (Phi-3)
    "2*ffn", "ffn*2"                        all gates, then all ups (Phi-3); gate and up in turns (gpt-oss)
    "kv_heads*(group + 2)*head_dim"         of each group its queries, then key and value (Falcon)

A size alone may also be "a // b". In a product the first factor runs slowest. `group` stands for the query heads of
the key-value head before it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from types import CodeType

import torch
from torch import Tensor

GROUP = "group"
Chosen = Callable[[str], Tensor | None]
"""Axis → which of it stay, int64 ascending; None keeps all."""


def size(formula: str, sizes: Mapping[str, int]) -> int:
    """Length of the dimension.

    Raises:
        NameError: a name that `sizes` lacks.
    """
    known = {GROUP: sizes["heads"] // sizes["kv_heads"]} if _has_group(formula) else {}
    return int(eval(_compiled(formula), known, sizes))  # of nothing but names, numbers, +, * and //


def names(formula: str) -> frozenset[str]:
    """The sizes that it depends on."""
    return frozenset(_names(_parse(formula)))


def index(formula: str, sizes: Mapping[str, int], chosen: Chosen) -> Tensor | None:
    """Positions along the dimension that stay, int64 ascending; None where all do.

    Args:
        sizes: before the cut.
    """
    if all(chosen(name) is None for name in names(formula)):
        return None
    return _index(_parse(formula), sizes, chosen, None)


def owner(formula: str, sizes: Mapping[str, int], axis: str) -> Tensor:
    """To which element of an axis each position belongs, int64; −1: to none."""
    return _owner(_parse(formula), sizes, axis, None)


@functools.cache
def _parse(formula: str) -> ast.expr:
    """Raises ValueError: neither a sum or product of sizes nor a quotient of two."""
    tree = ast.parse(formula, mode="eval")
    if not all(isinstance(node, _ALLOWED) for node in ast.walk(tree)):
        raise ValueError(f"{formula!r} is no formula of sums and products")
    return tree.body


_ALLOWED = (ast.Expression, ast.BinOp, ast.Add, ast.Mult, ast.FloorDiv, ast.Name, ast.Load, ast.Constant)


@functools.cache
def _compiled(formula: str) -> CodeType:
    """A search sizes up a formula a million times."""
    return compile(ast.Expression(_parse(formula)), formula, "eval")


def _names(node: ast.expr) -> set[str]:
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found - {GROUP} | {"heads", "kv_heads"} if GROUP in found else found


@functools.cache
def _has_group(formula: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == GROUP for part in ast.walk(_parse(formula)))


def _size(node: ast.expr, sizes: Mapping[str, int]) -> int:
    return size(ast.unparse(node), sizes)


def _index(node: ast.expr, sizes: Mapping[str, int], chosen: Chosen, group: int | None) -> Tensor:
    """`group` is the key-value head that encloses the node."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            first, second = (_index(part, sizes, chosen, group) for part in (left, right))
            return torch.cat([first, second + _size(left, sizes)])
        case ast.BinOp(left, ast.Mult(), right):
            outer, width = _index(left, sizes, chosen, group), _size(right, sizes)
            if _has_group(ast.unparse(right)):
                return torch.cat([place * width + _index(right, sizes, chosen, place) for place in outer.tolist()])
            return (outer[:, None] * width + _index(right, sizes, chosen, group)).flatten()
        case ast.Name("group"):
            assert group is not None, "a group is a part of its key-value head"
            per_group, heads = sizes["heads"] // sizes["kv_heads"], chosen("heads")
            return torch.arange(per_group) if heads is None else heads[heads // per_group == group] % per_group
        case ast.Name(name):
            kept = chosen(name)
            return torch.arange(sizes[name]) if kept is None else kept
        case ast.Constant(int(number)):
            return torch.arange(number)
    raise ValueError(f"{ast.unparse(node)!r} is no formula of sums and products")


def _owner(node: ast.expr, sizes: Mapping[str, int], axis: str, group: int | None) -> Tensor:
    """`group` as in `_index`."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return torch.cat([_owner(part, sizes, axis, group) for part in (left, right)])
        case ast.BinOp(left, ast.Mult(), right):
            outer, width = _owner(left, sizes, axis, group), _size(right, sizes)
            if axis == "heads" and _has_group(ast.unparse(right)):
                return torch.cat([_owner(right, sizes, axis, place) for place in range(len(outer))])
            if axis in _names(left):
                return outer.repeat_interleave(width)
            return _owner(right, sizes, axis, group).repeat(len(outer))
        case ast.Name("group") if axis == "heads":
            assert group is not None, "a group is a part of its key-value head"
            per_group = sizes["heads"] // sizes["kv_heads"]
            return group * per_group + torch.arange(per_group)
        case ast.Name(name) if name == axis:
            return torch.arange(sizes[name])
    return torch.full((_size(node, sizes),), -1)
