"""Our causal attention beside PyTorch's scaled_dot_product_attention on this CPU, forwards and backwards.

Usage: python benchmarks/attention.py
Turns are taken A B A B; medians. Errors are relative to float64, so that speed is not bought with accuracy unseen.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import timed

from prunus import hardware
from prunus.attention import attend

ROUNDS = 9
SHAPES = {
    "SmolLM2-135M, 4 × 512": (4, 9, 3, 512, 64),
    "SmolLM2-135M, 1 × 2048": (1, 9, 3, 2048, 64),
    "Gemma-3-270M, 2 × 512": (2, 4, 1, 512, 256),
}


def main() -> None:
    hardware.keep_freed_memory()
    for name, (batch, heads, groups, length, width) in SHAPES.items():
        torch.manual_seed(0)
        inputs = [
            torch.randn(batch, length, count, width).bfloat16().transpose(1, 2).requires_grad_()
            for count in (heads, groups, groups)
        ]
        gradient = torch.randn(batch, length, heads, width).bfloat16()
        documents = torch.arange(length) // 200
        packed = ((documents[:, None] == documents) & torch.ones(length, length).tril().bool()).expand(batch, 1, -1, -1)
        for masked, mask in {"causal": None, "documents": packed}.items():
            runs = {"torch": plain(mask), "ours": ours(mask)}
            exact = plain(mask)(*[x.detach().double() for x in inputs])
            seconds = timed({key: both_ways(run, inputs, gradient) for key, run in runs.items()}, rounds=ROUNDS)
            errors = {key: relative_error(run(*inputs).detach(), exact) for key, run in runs.items()}
            print(
                f"{name:24} {masked:10} torch {seconds['torch'] * 1e3:6.1f} ms  ours {seconds['ours'] * 1e3:6.1f} ms  "
                f"{seconds['torch'] / seconds['ours']:.2f} ×   "
                f"error torch {errors['torch']:.1e}  ours {errors['ours']:.1e}"
            )


def plain(mask: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As transformers calls it: key-value heads repeated, output transposed."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2).contiguous()

    return run


def ours(mask: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def both_ways(run: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(run(*inputs), inputs, gradient)

    return step


if __name__ == "__main__":
    main()
