"""What the student may cost: parameters, or bytes of memory. Parsed from what the user wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prunus import cost
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.errors import BadRecipe
from prunus.families import Family

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9,
            "kib": 2**10, "mib": 2**20, "gib": 2**30}  # fmt: skip
MEMORY_CONTEXT = 4096
"""Tokens of the KV cache that a memory budget includes."""


@dataclass(frozen=True)
class Budget:
    """A limit that architectures are compared with.

    Attributes:
        text: as the user wrote it.
        target: parameters, or bytes.
        family: of the teacher.
        shapes: of its tensors, to count an architecture without building it.
        bytes_per_value: 0 for a budget of parameters; of a memory budget the size of a weight.
    """

    text: str
    target: int
    family: Family
    shapes: cost.Shapes
    bytes_per_value: int

    def cost(self, architecture: Architecture) -> int:
        """Parameters; or bytes of the weights and of the KV cache of one sequence of `MEMORY_CONTEXT` tokens."""
        weights = self.parameters(architecture)
        if not self.bytes_per_value:
            return weights
        cache = MEMORY_CONTEXT * cost.kv_bytes_per_token(
            self.family, self.shapes, architecture, bytes_per_value=self.bytes_per_value
        )
        return weights * self.bytes_per_value + cache

    def parameters(self, architecture: Architecture) -> int:
        return sum(size for part, size in cost.count(self.shapes, architecture).items() if part != "buffers")


def parse_quantity(text: str) -> float:
    """`200k`, `95M`, `1.5B`, `180MB` → the number. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity such as 200k, 95M or 180MB")
    return float(match[1].replace("_", "")) * SUFFIXES[match[2].lower()]


def parse_share(text: str) -> float | None:
    """`0.7x` → 0.7; None where the text is not a share."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x\s*", text)
    return float(match[1]) if match else None


def check_amount(text: str) -> str:
    """The text, if it is a share such as `0.7x` or a quantity such as `95M`. Raises ValueError."""
    if parse_share(text) is not None:
        return text
    try:
        number = parse_quantity(text)
    except ValueError as error:
        raise ValueError(f"{error}, nor a share of the teacher such as 0.7x") from error
    if 0 < number < 1:
        raise ValueError(f"{text!r} is less than one; did you mean {text.strip()}x, a share of the teacher?")
    return text


def parse_budget(
    teacher: Checkpoint, *, params: str | None = None, memory: str | None = None, ranking: Sequence[int] | None = None
) -> Budget:
    """A budget from `0.7x`, `95M` (parameters) or `180MB` (memory).

    Args:
        ranking: layers in the order in which they stay (see `cost.shapes`).
    Raises:
        BadRecipe: not exactly one of both, not a quantity, or not below the teacher's own.
    """
    if (params is None) == (memory is None):
        raise BadRecipe("give a budget: either params or memory (or an explicit arch)")
    text, kind = (params, "params") if params is not None else (str(memory), "memory")
    bytes_per_value = 0 if kind == "params" else teacher.dtype.itemsize
    shapes = cost.shapes(teacher.family, teacher.layout, ranking)
    budget = Budget(f"{kind} {text}", 0, teacher.family, shapes, bytes_per_value)
    whole = budget.cost(teacher.architecture)
    try:
        share = parse_share(check_amount(text))
    except ValueError as error:
        raise BadRecipe(f"{kind}: {error}") from error
    target = round(share * whole if share is not None else parse_quantity(text))
    if not 0 < target <= whole:
        raise BadRecipe(f"{kind}: {text} is {target:,}, but the teacher has {whole:,}; pruning only removes")
    return replace(budget, target=target)
