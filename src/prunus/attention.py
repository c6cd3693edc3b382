"""Causal attention for bfloat16 on CPUs: the queries in chunks, each against the keys that it can see.

PyTorch's own CPU kernel takes about twice as long, forwards and backwards (benchmarks/attention.py): its tiles are
small and their exponentials interrupt the GEMMs. Here the GEMMs are large and the softmax is one vectorised pass.
Numerics are those of transformers' "eager": scores rounded to the model's dtype, softmax in float32 inside. In float32
PyTorch's kernel is as fast, and stays.

Shapes: B sequences, A query heads, G key-value heads, R = A / G, M = B·G, S tokens, c tokens of a chunk, C = R·c,
K keys, D channels of a head.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prunus.anatomy import body_of

NAME = "prunus"
PLAIN = "sdpa"
CHUNK_ROWS = 128
KEEP_TOKENS = 512
"""Up to this length the probabilities are kept for the backward pass, 0.6 · S values per token and head; of longer
sequences they are computed again, so that memory grows with S, not S²."""


def install(model: nn.Module) -> None:
    """Let a transformers model on a CPU attend by `attend`; others are left as they are, and those that would then
    compute something else. What sees may attend by PyTorch's kernel where what reads, with sinks or soft-caps, cannot:
    both are asked."""
    if (
        isinstance(model, PreTrainedModel)
        and model.device.type != "cuda"
        and {each.config._attn_implementation for each in (model, body_of(model))} == {PLAIN}
        and not _minds_the_name(model)
    ):
        model.set_attn_implementation(NAME)


def _minds_the_name(model: nn.Module) -> bool:
    """Whether a forward pass looks for PyTorch's kernel in a list of names: sparse attention (DeepSeek V3.2) masks what
    its indexer left out under these names alone, and leaves it to the kernel under any other."""
    forwards = {inspect.unwrap(kind.forward) for kind in {type(module) for module in model.modules()}}
    codes = (forward.__code__ for forward in forwards if inspect.isfunction(forward))
    return any(isinstance(value, tuple | frozenset) and PLAIN in value for code in codes for value in code.co_consts)


@contextlib.contextmanager
def uninstalled(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these models attend by PyTorch's kernel."""
    changed = [
        model for model in models if isinstance(model, PreTrainedModel) and model.config._attn_implementation == NAME
    ]
    for model in changed:
        model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        for model in changed:
            model.set_attn_implementation(NAME)


def attend(q_BASD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys up to the query's own position, [B, S, A, D of v].

    Args:
        q_BASD: queries; head a reads key-value head a // (A / G).
        mask: bool [B or 1, 1, S, S], True where a query may see a key; must not allow later keys. None: all up to it.
    """
    out: Tensor = _Attend.apply(q_BASD, k_BGSD, v_BGSD, scale, mask)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BASD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        groups = k_BGSD.shape[1]
        q_BGRSD, v_MSD = _grouped(q_BASD, groups), v_BGSD.flatten(0, 1)
        k_MSD = (k_BGSD * scale).flatten(0, 1)  # the smaller of the two to be scaled
        batch, heads, length, _ = q_BASD.shape
        kept = []
        out_BSAD = q_BASD.new_empty(batch, length, heads, v_BGSD.shape[-1])
        for rows in _chunks(length):
            p_MCK = _probabilities(_rows(q_BGRSD, rows), k_MSD[:, : rows.stop], mask, rows, groups)
            part_MCD = torch.bmm(p_MCK, v_MSD[:, : rows.stop])
            out_BSAD[:, rows] = _heads(part_MCD, batch, heads).transpose(1, 2)
            if length <= KEEP_TOKENS and any(ctx.needs_input_grad):
                kept.append(p_MCK)
        ctx.save_for_backward(q_BGRSD, k_MSD, v_MSD, mask, *kept)
        ctx.scale = scale
        return out_BSAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSAD: Tensor) -> tuple[Tensor | None, ...]:
        q_BGRSD, k_MSD, v_MSD, mask, *kept = ctx.saved_tensors
        batch, length, heads, _ = grad_BSAD.shape
        groups = q_BGRSD.shape[1]
        grad_BGRSD = _grouped(grad_BSAD.transpose(1, 2), groups)
        dq_BSAD = grad_BSAD.new_empty(batch, length, heads, k_MSD.shape[-1])
        dk_MSD, dv_MSD = torch.zeros_like(k_MSD), torch.zeros_like(v_MSD)
        for number, rows in enumerate(_chunks(length)):
            q_MCD, grad_MCD = _rows(q_BGRSD, rows), _rows(grad_BGRSD, rows)
            k_MKD, v_MKD = k_MSD[:, : rows.stop], v_MSD[:, : rows.stop]
            p_MCK = kept[number] if kept else _probabilities(q_MCD, k_MKD, mask, rows, groups)
            dv_MSD[:, : rows.stop].baddbmm_(p_MCK.transpose(1, 2), grad_MCD)
            dp_MCK = torch.bmm(grad_MCD, v_MKD.transpose(1, 2))
            ds_MCK = torch._softmax_backward_data(dp_MCK, p_MCK, -1, p_MCK.dtype)
            dk_MSD[:, : rows.stop].baddbmm_(ds_MCK.transpose(1, 2), q_MCD)
            dq_BSAD[:, rows] = _heads(torch.bmm(ds_MCK, k_MKD), batch, heads).transpose(1, 2)
        dk_BGSD, dv_BGSD = (part_MSD.unflatten(0, (batch, groups)) for part_MSD in (dk_MSD, dv_MSD))
        return dq_BSAD.transpose(1, 2), dk_BGSD.mul_(ctx.scale), dv_BGSD, None, None


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ROWS, length)) for start in range(0, length, CHUNK_ROWS)]


def _grouped(x_BASD: Tensor, groups: int) -> Tensor:
    return x_BASD.unflatten(1, (groups, -1))


def _rows(x_BGRSD: Tensor, rows: slice) -> Tensor:
    """These tokens of all query heads that share a key-value head, as the rows of one matrix, [M, C, D]."""
    return x_BGRSD[:, :, :, rows].flatten(2, 3).flatten(0, 1)


def _heads(x_MCD: Tensor, batch: int, heads: int) -> Tensor:
    """The way back, [B, A, c, D]."""
    return x_MCD.view(batch, heads, -1, x_MCD.shape[-1])


def _probabilities(q_MCD: Tensor, k_MKD: Tensor, mask: Tensor | None, rows: slice, groups: int) -> Tensor:
    """softmax of the scores of these rows, [M, C, K], in the dtype of q."""
    scores_MCK = torch.bmm(q_MCD, k_MKD.transpose(1, 2))
    tokens = rows.stop - rows.start
    lowest = torch.finfo(scores_MCK.dtype).min  # not −inf: a row without any key (padding) must not become NaN
    scores_BGRcK = scores_MCK.view(-1, groups, scores_MCK.shape[1] // tokens, tokens, rows.stop)
    # Adding costs a quarter of filling by a mask.
    if mask is None:
        scores_BGRcK[..., rows.start :].add_(scores_MCK.new_full((tokens, tokens), lowest).triu_(1))
    else:
        hidden_B1cK = ~mask[:, :, rows, : rows.stop]
        scores_BGRcK.add_(scores_MCK.new_zeros(hidden_B1cK.shape).masked_fill_(hidden_B1cK, lowest)[:, :, None])
    return torch.softmax(scores_MCK, dim=-1)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. What is not causal self-attention over whole sequences (decoding with a cache,
    attention in both directions, dropout) goes to PyTorch's kernel."""
    suited = (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2] > 1
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and options.get("is_causal") is not False
        and getattr(module, "is_causal", True)
        and options.get("dropout", 0.0) == 0.0
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )
    if not suited:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return attend(query, key, value, scale=scale, mask=attention_mask), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
