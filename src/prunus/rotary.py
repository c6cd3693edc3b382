"""Rotary embeddings in two passes instead of five, and two for the gradient.

transformers writes  y = x cos + (−x₂, x₁) sin  with x₁ and x₂ the halves of the channels; autograd remembers and undoes
each of its steps, which on a CPU takes twice as long.

Shapes: A heads, S tokens, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prunus.faster import CLOSE, Faster

NAME = "apply_rotary_pos_emb"
"""The function that the attention of nearly every family calls, from its own file."""

Function = Callable[..., tuple[Tensor, Tensor]]


def install(model: nn.Module) -> None:
    """Let attention that turns halves of its channels do so as here. Families that pair channels otherwise, or write
    it otherwise, are left alone."""
    if any(weight.is_cuda for weight in model.parameters()):
        return
    for module in model.modules():
        attention: Any = type(module)
        if not isinstance(module, Faster) and (ours := _of(attention)) is not None:
            module.__class__ = ours


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned by the angles of `cos` and `sin`, which broadcast to it: y₁ = x₁ c₁ − x₂ s₁, y₂ = x₂ c₂ + x₁ s₂."""
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (out_1, out_2), (x_1, x_2), (sin_1, sin_2) = (part.chunk(2, dim=-1) for part in (out, x, sin))
        out_1.addcmul_(x_2, sin_1, value=-1)
        out_2.addcmul_(x_1, sin_2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dx₁ = g₁ c₁ + g₂ s₂, dx₂ = g₂ c₂ − g₁ s₁"""
        cos, sin = ctx.saved_tensors
        out = grad * cos
        (out_1, out_2), (grad_1, grad_2), (sin_1, sin_2) = (part.chunk(2, dim=-1) for part in (out, grad, sin))
        out_1.addcmul_(grad_2, sin_2)
        out_2.addcmul_(grad_1, sin_1, value=-1)
        return out, None, None


@functools.cache
def _of(attention: Any) -> type[Faster] | None:
    """The class whose forward calls our function, or None if it calls none that does the same."""
    forward = attention.forward
    if hasattr(forward, "__wrapped__") or NAME not in getattr(forward, "__globals__", {}):
        return None
    own: Function = forward.__globals__[NAME]
    if NAME not in forward.__code__.co_names or not _is_the_same(own):
        return None
    globals_ = forward.__globals__ | {NAME: _like(own)}
    ours = FunctionType(forward.__code__, globals_, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **options: Any) -> Any:
        return (forward if torch.compiler.is_compiling() else ours)(self, *args, **options)

    return type(attention.__name__, (Faster, attention), {"forward": call})


def _like(own: Function) -> Function:
    """What stands for `own`: the same, where the tables fit."""

    def apply(q_BASD: Tensor, k_BASD: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        fits = cos.shape[-1] == q_BASD.shape[-1] and q_BASD.dtype == k_BASD.dtype == cos.dtype == sin.dtype
        if rest or options or not fits or cos.ndim != 3:
            return own(q_BASD, k_BASD, cos, sin, *rest, **options)
        cos, sin = cos[:, None], sin[:, None]
        return rotate(q_BASD, cos, sin), rotate(k_BASD, cos, sin)

    return apply


@torch.no_grad()
def _is_the_same(own: Function) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    tables = torch.randn(2, 1, 3, 8, generator=generator)
    try:
        expected, found = own(q, k, *tables), _like(own)(q, k, *tables)
    except (TypeError, RuntimeError):
        return False  # another signature, or tables of another shape
    return all((a - b).abs().max() <= CLOSE * b.abs().max() for a, b in zip(found, expected, strict=True))
