"""Causal attention for bfloat16 on CPUs: the queries in chunks, each against the keys that it can see.

PyTorch's own CPU kernel takes about twice as long, forwards and backwards (benchmarks/attention.py): its tiles are
small and their exponentials interrupt the GEMMs. Here the GEMMs are large and the softmax is one vectorised pass.
Numerics are those of transformers' "eager": scores rounded to the model's dtype, softmax in float32 inside. In float32
PyTorch's kernel is as fast, and stays.

Shapes: B sequences, A query heads, G key-value heads, S tokens, D channels of a head, C rows of a chunk × heads of a
group, K keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "prunus"
PLAIN = "sdpa"
CHUNK_ROWS = 128


def install(model: nn.Module) -> None:
    """Let a transformers model on a CPU attend by `attend`; others are left as they are."""
    if isinstance(model, PreTrainedModel) and model.device.type == "cpu" and model.config._attn_implementation == PLAIN:
        model.set_attn_implementation(NAME)


@contextlib.contextmanager
def uninstalled(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Inside, these models run as transformers alone would run them."""
    changed = [model for model in models if model.config._attn_implementation == NAME]
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
    """Backward computes the probabilities again, so that only q, k and v are kept."""

    @staticmethod
    def forward(ctx: Any, q_BASD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q_BASD, k_BGSD, v_BGSD, mask)
        ctx.scale = scale
        batch, heads, length, _ = q_BASD.shape
        out_BSAD = q_BASD.new_empty(batch, length, heads, v_BGSD.shape[-1])
        for rows in _chunks(length):
            q_BGCD = _grouped(q_BASD[:, :, rows], k_BGSD) * scale
            p_BGCK = _probabilities(q_BGCD, k_BGSD[:, :, : rows.stop], mask, rows)
            part_BGCD = p_BGCK @ v_BGSD[:, :, : rows.stop]
            out_BSAD[:, rows] = _ungrouped(part_BGCD, heads).transpose(1, 2)
        return out_BSAD

    @staticmethod
    def backward(ctx: Any, grad_BSAD: Tensor) -> tuple[Tensor | None, ...]:
        q_BASD, k_BGSD, v_BGSD, mask = ctx.saved_tensors
        heads, length = q_BASD.shape[1:3]
        dq_BASD = torch.empty_like(q_BASD)
        dk_BGSD, dv_BGSD = torch.zeros_like(k_BGSD), torch.zeros_like(v_BGSD)
        for rows in _chunks(length):
            k_BGKD, v_BGKD = k_BGSD[:, :, : rows.stop], v_BGSD[:, :, : rows.stop]
            q_BGCD = _grouped(q_BASD[:, :, rows], k_BGSD) * ctx.scale
            grad_BGCD = _grouped(grad_BSAD[:, rows].transpose(1, 2), k_BGSD)
            p_BGCK = _probabilities(q_BGCD, k_BGKD, mask, rows)
            dv_BGSD[:, :, : rows.stop] += p_BGCK.transpose(2, 3) @ grad_BGCD
            dp_BGCK = grad_BGCD @ v_BGKD.transpose(2, 3)
            ds_BGCK = torch._softmax_backward_data(dp_BGCK, p_BGCK, -1, p_BGCK.dtype)
            dk_BGSD[:, :, : rows.stop] += ds_BGCK.transpose(2, 3) @ q_BGCD
            dq_BASD[:, :, rows] = _ungrouped(ds_BGCK @ k_BGKD, heads)
        return dq_BASD.mul_(ctx.scale), dk_BGSD, dv_BGSD, None, None


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ROWS, length)) for start in range(0, length, CHUNK_ROWS)]


def _grouped(rows_BAcD: Tensor, k_BGSD: Tensor) -> Tensor:
    """The query heads that share a key-value head become rows of one matrix: [B, G, A/G · c, D]."""
    return rows_BAcD.unflatten(1, (k_BGSD.shape[1], -1)).flatten(2, 3)


def _ungrouped(rows_BGCD: Tensor, heads: int) -> Tensor:
    return rows_BGCD.unflatten(2, (heads // rows_BGCD.shape[1], -1)).flatten(1, 2)


def _probabilities(q_BGCD: Tensor, k_BGKD: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    """softmax of the scores of these rows, [B, G, C, K], in the dtype of q."""
    scores_BGCK = q_BGCD @ k_BGKD.transpose(2, 3)
    # Not −inf: a row without any key (padding) must not become NaN.
    lowest = torch.finfo(scores_BGCK.dtype).min
    scores_BGRcK = scores_BGCK.unflatten(2, (-1, rows.stop - rows.start))
    if mask is None:
        later_cc = torch.ones(rows.stop - rows.start, rows.stop - rows.start, dtype=torch.bool).triu_(1)
        scores_BGRcK[..., rows.start :].masked_fill_(later_cc, lowest)
    else:
        scores_BGRcK.masked_fill_(~mask[:, :, None, rows, : rows.stop], lowest)
    return torch.softmax(scores_BGCK, dim=-1)


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
        and options.get("position_bias") is None
    )
    if not suited:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return attend(query, key, value, scale=scale, mask=attention_mask), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
