"""What the experts of a layer compute, one by one. transformers holds them as stacked weights in one module, whose
forward shows nothing of what happens inside.

Shapes: N tokens, K experts that a token is sent to, E experts, H channels, F neurons of an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRITE = "down_proj"
"""Name of the experts' weight that writes to the stream."""


class Experts(Protocol):
    """What transformers promises of a module that holds experts (`use_experts_implementation`). Weights have the expert
    first: gate_up_proj or up_proj, and down_proj, [E, outputs, inputs], or [E, inputs, outputs] if transposed."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    down_proj: Tensor
    forward: Callable[..., Tensor]
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


def of(layer: nn.Module, name: str) -> Experts:
    """A layer's experts."""
    return cast(Experts, layer.get_submodule(name))


@dataclass(frozen=True)
class Routed:
    """What one expert made of the tokens that it was sent.

    Attributes:
        expert: its number.
        tokens_N: which tokens, int64.
        weight_N: of its output in the sum, from the router.
        inner_NF: input of its down projection.
        output_NH: its output, before the weight.
    """

    expert: int
    tokens_N: Tensor
    weight_N: Tensor
    inner_NF: Tensor
    output_NH: Tensor


See = Callable[[Routed], None]


def run(module: Experts, states_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor, see: See) -> Tensor:
    """The module's output, [N, H]; `see` is called with what each expert did."""
    total_NH = torch.zeros_like(states_NH)
    for expert in range(len(module.down_proj)):
        tokens, place = torch.where(chosen_NK == expert)
        if not len(tokens):
            continue
        inner_NF = inner(module, expert, states_NH[tokens])
        output_NH = written(module, expert, inner_NF)
        weight_N = weights_NK[tokens, place]
        see(Routed(expert, tokens, weight_N, inner_NF, output_NH))
        total_NH.index_add_(0, tokens, (output_NH * weight_N[:, None]).to(total_NH.dtype))
    return total_NH


def inner(module: Experts, expert: int, states_NH: Tensor) -> Tensor:
    """What an expert hands to its down projection, [N, F]."""
    read_NO = _linear(module, read_of(module), expert, states_NH)
    return module._apply_gate(read_NO) if module.has_gate else module.act_fn(read_NO)


def written(module: Experts, expert: int, inner_NF: Tensor) -> Tensor:
    """The down projection's output, [N, H]."""
    return _linear(module, WRITE, expert, inner_NF)


def weight(module: Experts, name: str, expert: int) -> Tensor:
    """A view of an expert's weight, [outputs, inputs]."""
    found = getattr(module, name)[expert]
    return found.T if module.is_transposed else found


def bias(module: Experts, name: str, expert: int) -> Tensor | None:
    """A view of an expert's bias, [outputs]."""
    return getattr(module, f"{name}_bias")[expert] if module.has_bias else None


def _linear(module: Experts, name: str, expert: int, x: Tensor) -> Tensor:
    return F.linear(x, weight(module, name, expert), bias(module, name, expert))


def read_of(module: Experts) -> str:
    """Name of the weight that reads the stream."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def joined(module: Experts, name: str, expert: int) -> Tensor:
    """float32 [outputs, inputs], with the bias as last column if there is one."""
    found, shift = weight(module, name, expert).float(), bias(module, name, expert)
    return found if shift is None else torch.cat([found, shift.float()[:, None]], dim=1)


@torch.no_grad()
def put(module: Experts, name: str, expert: int, joined: Tensor) -> None:
    """Inverse of `joined`."""
    if (shift := bias(module, name, expert)) is not None:
        shift.copy_(joined[:, -1])
        joined = joined[:, :-1]
    weight(module, name, expert).copy_(joined)


@contextlib.contextmanager
def observed(module: Experts, see: See) -> Iterator[None]:
    """Inside, the module's forward pass shows what each expert does."""
    module.forward = lambda states_NH, chosen_NK, weights_NK: run(module, states_NH, chosen_NK, weights_NK, see)
    try:
        yield
    finally:
        del module.forward  # that of its class comes to light again
