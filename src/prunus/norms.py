"""RMSNorm with its gradient by hand: in less than half the time, and with half of what is kept for the backward pass.

transformers writes the norm as six operations in float32, each of which autograd remembers; in a distillation step on a
CPU they cost as much as a third of the attention. Here the input and one number per row are kept. The product with the
weight is rounded once, where some models round twice.

Shapes: N rows (tokens, or tokens × heads), H channels.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prunus.faster import CLOSE, Faster


class Fast(Faster):
    """How an RMSNorm computes then."""

    weight: Tensor
    offset: int

    def forward(self, x: Tensor) -> Tensor:
        weight_H = self.weight.float() + self.offset if self.offset else self.weight
        return rms_norm(x, weight_H, _eps(self))


def install(model: nn.Module) -> None:
    """Let every RMSNorm of a model compute as here; norms that turn out to compute something else are left alone."""
    for module in model.modules():
        if _looks_like_one(module):
            _try(module)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension, in float32 inside, in the dtype of x."""
    if x.is_cuda or torch.compiler.is_compiling():
        # A float32 weight (Gemma's 1 + w) is not rounded to the type of x.
        return F.rms_norm(x.to(weight_H.dtype), weight_H.shape, weight_H, eps).to(x.dtype)
    out: Tensor = _Norm.apply(x, weight_H, eps)
    return out


class _Norm(torch.autograd.Function):
    """y = x r w with r = 1 / √(mean x² + eps);  dx = r (g w − x̂ · mean(g w x̂)) with x̂ = x r;  dw = Σ_n g x̂"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        r_N1 = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, r_N1)
        return wide.mul_(r_N1).mul_(weight_H.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_H, r_N1 = ctx.saved_tensors
        grad_wide, unit = _wide(grad), _wide(x).mul_(r_N1)
        wide_H = weight_H.to(grad_wide.dtype)
        product = grad_wide * unit
        grad_weight_H = product.flatten(0, -2).sum(0).to(weight_H.dtype) if ctx.needs_input_grad[1] else None
        minus_mean_N1 = (product @ wide_H)[..., None].div_(-x.shape[-1])
        return grad_wide.mul_(wide_H).addcmul_(unit, minus_mean_N1).mul_(r_N1).to(x.dtype), grad_weight_H, None


def _wide(x: Tensor) -> Tensor:
    """A copy in float32, or in float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)


@functools.cache
def _faster(norm: type[nn.Module], offset: int) -> type[Fast]:
    return type(norm.__name__, (Fast, norm), {"offset": offset})


def _looks_like_one(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and not isinstance(module, Fast)
        and isinstance(weight_H := getattr(module, "weight", None), nn.Parameter)
        and not weight_H.is_meta
        and _eps(module) is not None
        and len(inspect.signature(module.forward).parameters) == 1  # not the gated ones
    )


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _try(module: nn.Module) -> None:
    """Change the class of a norm if it then still computes the same, with its weight as it is or with 1 added.

    On a weight around 0: beside the large ones of a trained model (Gemma 3 has 60) the 1 would be lost in the rounding.
    """
    norm, own = type(module), module.weight
    assert isinstance(own, Tensor)
    generator = torch.Generator().manual_seed(0)
    weight_H, x = torch.randn(len(own), generator=generator), torch.randn(2, len(own), generator=generator)
    module.weight = nn.Parameter(weight_H.to(own), requires_grad=False)
    expected = module.forward(x.to(own))
    for offset in (0, 1):
        module.__class__ = _faster(norm, offset)  # type: ignore[arg-type]  # mypy takes a class for its instances
        if (module.forward(x.to(own)) - expected).abs().max() <= CLOSE * expected.abs().max():
            break
    else:
        module.__class__ = norm
    module.weight = own
