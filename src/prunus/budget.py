"""What the student may cost: parameters, bytes, FLOPs or time, several at once. Parsed from what the user wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prunus import cost
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.errors import BadRecipe
from prunus.families import Family

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12, "kb": 10**3, "mb": 10**6, "gb": 10**9,
            "kib": 2**10, "mib": 2**20, "gib": 2**30}  # fmt: skip
TIMES = {"us": 1, "µs": 1, "ms": 10**3, "s": 10**6}
CONTEXT = 4096
"""Tokens of the KV cache that a budget counts, unless the user says how many."""


@dataclass(frozen=True)
class Costs:
    """What an architecture costs, counted without building it.

    Attributes:
        family: of the teacher.
        shapes: of the teacher's tensors.
        bytes_per_value: of a weight, and of a value in the KV cache.
        context: tokens of the KV cache of one sequence.
        windows: see `cost.windows_of`.
        rates: microseconds of each of `amounts` (see `latency.measured_rates`); empty where no model was timed.
    """

    family: Family
    shapes: cost.Shapes
    bytes_per_value: int
    context: int = CONTEXT
    windows: Sequence[int | None] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    def parameters(self, architecture: Architecture) -> int:
        return cost.total(self.shapes, architecture)

    def weights(self, architecture: Architecture) -> int:
        return self.parameters(architecture) * self.bytes_per_value

    def kv_cache(self, architecture: Architecture) -> int:
        return cost.kv_bytes(
            self.family,
            self.shapes,
            architecture,
            context=self.context,
            windows=self.windows or [None] * len(self.shapes.order),
            bytes_per_value=self.bytes_per_value,
        )

    def memory(self, architecture: Architecture) -> int:
        return self.weights(architecture) + self.kv_cache(architecture)

    def flops(self, architecture: Architecture) -> int:
        return cost.flops_per_token(self.family, self.shapes, architecture)

    def latency(self, architecture: Architecture) -> int:
        return round(sum(self.rates[name] * amount for name, amount in self.amounts(architecture).items()))

    def amounts(self, architecture: Architecture) -> dict[str, int]:
        """What the time of a token is made of: the step itself, layers, the weights that they and the head read, and of
        an earlier token the keys and values that are read, and the heads that look at it."""
        parts = cost.count(self.shapes, architecture, active=True)
        read = {branch.name: parts[branch.name] for branch in self.family.branches if branch.name in parts}
        head = parts.get("head") or architecture.vocab * architecture.hidden
        cached = cost.kv_bytes_per_token(self.family, self.shapes, architecture, bytes_per_value=1)
        looking = cost.attending(self.shapes, architecture) * architecture.get("heads", 0)
        return {"step": 1, "layers": architecture.layers, "head": head, "cached": cached, "looking": looking, **read}


@dataclass(frozen=True)
class Kind:
    """Something that can be limited.

    Attributes:
        unit: what it is counted in.
        of: what an architecture has of it.
        suffixes: of quantities of it.
    """

    unit: str
    of: Callable[[Costs, Architecture], int]
    suffixes: Mapping[str, int] = field(default_factory=lambda: SUFFIXES)


LIMITS: Mapping[str, Kind] = {
    "params": Kind("parameters", Costs.parameters),
    "memory": Kind("bytes", Costs.memory),
    "weights": Kind("bytes", Costs.weights),
    "kv_cache": Kind("bytes", Costs.kv_cache),
    "flops": Kind("FLOPs", Costs.flops),
    "latency": Kind("µs", Costs.latency, TIMES),
}
"""By the recipe's key. "memory" is weights and KV cache, "flops" those of one token's forward pass, "latency" the time
of one generated token on this machine."""


@dataclass(frozen=True)
class Limit:
    """One line of a budget.

    Attributes:
        kind: key in `LIMITS`.
        text: as the user wrote it.
        target: at most so much.
        whole: what shares are shares of.
    """

    kind: str
    text: str
    target: int
    whole: int

    def __str__(self) -> str:
        return f"{self.kind} {self.text}"


@dataclass(frozen=True)
class Budget:
    """Limits that architectures are compared with, all of which must hold."""

    costs: Costs
    limits: tuple[Limit, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits))

    def cost(self, limit: Limit, architecture: Architecture) -> int:
        return LIMITS[limit.kind].of(self.costs, architecture)

    def shares(self, architecture: Architecture) -> list[float]:
        """Of each limit how much is used up; beyond 1 it is exceeded."""
        return [self.cost(limit, architecture) / limit.target for limit in self.limits]

    def use(self, architecture: Architecture) -> float:
        """Of the limit that is used up most."""
        return max(self.shares(architecture))

    def parameters(self, architecture: Architecture) -> int:
        return self.costs.parameters(architecture)


def parse_quantity(text: str, suffixes: Mapping[str, int] = SUFFIXES) -> float:
    """`200k`, `95M`, `1.5B`, `180MB`, or of times `40ms` → the number. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Zµ]*)\s*", text)
    if match is None or match[2].lower() not in suffixes:
        examples = "200k, 95M or 180MB" if suffixes is SUFFIXES else "40ms"
        raise ValueError(f"{text!r} is not a quantity such as {examples}")
    number = float(match[1].replace("_", "")) * suffixes[match[2].lower()]
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]}… is more than any quantity")
    return number


def parse_share(text: str) -> float | None:
    """`0.7x` → 0.7; None where the text is not a share."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x\s*", text)
    return float(match[1]) if match else None


def check_amount(text: str, suffixes: Mapping[str, int] = SUFFIXES) -> str:
    """The text, if it is a share such as `0.7x` or a quantity such as `95M`. Raises ValueError."""
    if parse_share(text) is not None:
        return text
    if re.fullmatch(r"\s*0?\.[0-9]*[1-9][0-9]*\s*", text):
        raise ValueError(f"{text!r} is less than one; did you mean {text.strip()}x, a share of the teacher?")
    try:
        parse_quantity(text, suffixes)
    except ValueError as error:
        raise ValueError(f"{error}, nor a share of the teacher such as 0.7x") from error
    return text


def parse_budget(
    model: Checkpoint,
    *,
    whole: Checkpoint | None = None,
    ranking: Sequence[int] | None = None,
    context: int = CONTEXT,
    rates: Mapping[str, float] | None = None,
    more: bool = False,
    **limits: str | None,
) -> Budget:
    """A budget from `params="0.7x"`, `params="95M"`, `memory="180MB"` and so on; see `LIMITS`.

    Args:
        model: what is cut.
        whole: what shares are shares of, if that is another: the teacher of a student that is cut further.
        ranking: layers in the order in which they stay (see `cost.shapes`).
        context: tokens of the KV cache.
        rates: see `Costs`; a limit of latency needs them.
        more: there are limits beside these, so the model may keep all of these already.
        limits: those that are None do not count.
    Raises:
        BadRecipe: none at all, not a quantity, more than the whole has, or none that the model does not keep already.
    """
    given = {kind: text for kind, text in limits.items() if text is not None}
    if not given:
        raise BadRecipe(f"give a budget: {', '.join(LIMITS)}, or several of them (or an explicit arch)")
    costs = costs_of(model, context=context, rates=rates, ranking=ranking)
    mine = {kind: LIMITS[kind].of(costs, model.architecture) for kind in given}
    theirs = mine
    if whole is not None:
        others = costs_of(whole, context=context, rates=rates)
        theirs = {kind: LIMITS[kind].of(others, whole.architecture) for kind in given}
    found = tuple(_limit(kind, text, theirs[kind]) for kind, text in given.items())
    if not more and all(limit.target > mine[limit.kind] for limit in found):  # one of several may hold already
        held = ", ".join(f"{limit} is {limit.target:,}, and it has {mine[limit.kind]:,}" for limit in found)
        raise BadRecipe(f"{model.name} keeps its budget already ({held}); pruning only removes")
    return Budget(costs, found)


def costs_of(
    model: Checkpoint,
    *,
    context: int = CONTEXT,
    rates: Mapping[str, float] | None = None,
    ranking: Sequence[int] | None = None,
) -> Costs:
    """Args as of `parse_budget`."""
    shapes = cost.shapes(model.family, model.layout, ranking)
    windows = cost.windows_of(model.family.text(model.config), model.architecture.layers, ranking)
    return Costs(model.family, shapes, model.dtype.itemsize, context, windows, rates or {})


def _limit(kind: str, text: str, whole: int) -> Limit:
    """Args: `whole` that shares are of."""
    suffixes = LIMITS[kind].suffixes
    try:
        share = parse_share(check_amount(text, suffixes))
    except ValueError as error:
        raise BadRecipe(f"{kind}: {error}") from error
    target = round(share * whole if share is not None else parse_quantity(text, suffixes))
    if not 0 < target <= whole:
        unit = LIMITS[kind].unit
        raise BadRecipe(f"{kind}: {text} is {target:,} {unit}, but the model has {whole:,}; pruning only removes")
    return Limit(kind, text, target, whole)
