"""The losses from hidden states: chunked, gradients in the forward pass, [tokens, vocabulary] never whole.

The readable twins are in `losses`, on `losses.head_logits(...)`. Logits and softmax are fp32 always (`row_blocks`); G,
the gradient to the logits, is rounded to the dtype of the hidden states for its two GEMMs. With bf16 that costs about
0.2 % of the gradient however near the student is to its teacher, where bf16 logits cost up to 34 %.

N tokens · C of a chunk · R of a row block · V vocabulary · v a block of it · D hidden channels of the student, E of the
teacher · K kept ids or samples of a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prunus import losses
from prunus.head import Dense, Head, Targets
from prunus.kernels import KERNELS, TopK
from prunus.row_blocks import LIKELY_IDS, ROW_TOKENS, Loss, RowBlocks, rounds

CHUNK_TOKENS = 1024
"""Tokens whose G is kept at once. Fewer cost passes over the [V, D] gradient of the head, more cost memory."""
VOCAB_BLOCK = 8192
"""Rows of the head whose gradient is added at once, so that the product is still in the cache when it is added."""


def divergence(
    kind: str,
    hidden_ND: Tensor,
    student: Head,
    targets: Targets,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    mix: float = 0.5,
    mask_N: Tensor | None = None,
    label_N: Tensor | None = None,
    cross_entropy_share: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
    expected: float | None = None,
) -> Tensor:
    """Divergence between teacher and student, with gradients to the student's hidden states and head.

        L = (1 − c) · divergence + c · cross-entropy,   dH = G W,   dW = Gᵀ H,   db = Σ_n G

    Everything is read in the dtype of the student's hidden states, as under autocast. A head that does not require
    grad gets no dW. Nothing flows to the teacher. One backward pass only: it spends the gradients.

    Args:
        kind: key of `losses.DIVERGENCES`; of `TopK` and `Samples` only "forward_kl" can be computed.
        hidden_ND: the student's states after the last norm; bf16 or fp32.
        student: its head; vocabularies of different size are cut to the ids they share.
        targets: the teacher on the same tokens.
        num_tokens: valid tokens of the whole step, over all micro-batches and ranks.
        temperature: T > 0; T² on the divergence, T on its gradient. The cross-entropy is always at T = 1.
        mix: as in `losses.divergence`.
        mask_N: bool [N], True for the tokens that count; None counts all.
        label_N: the id that follows each position, int64. Needed where `cross_entropy_share` is not 0, and elsewhere a
            help to round the logits well.
        cross_entropy_share: c in [0, 1].
        chunk_tokens: tokens whose G is kept at once, `chunk_tokens` × V × 2 bytes in bf16.
        expected: the loss per token of the step before, if there was one. It saves time where it is about right.
    Returns:
        float32 scalar.
    Raises:
        ValueError: different numbers of tokens, num_tokens < 1, temperature <= 0, mix or cross_entropy_share out of
            range, chunk_tokens < 1, or a divergence that these targets do not give.
    """
    losses.check_arguments(len(hidden_ND), len(targets), mask_N, num_tokens, temperature, mix)
    _check(kind, targets, len(student.weight_VD), label_N, cross_entropy_share, chunk_tokens)
    if mask_N is not None:
        hidden_ND, targets = hidden_ND[mask_N], targets.masked(mask_N)
        label_N = None if label_N is None else label_N[mask_N]
    # Under no_grad the Function would not know, and compute gradients for nobody.
    needs = [
        torch.is_grad_enabled() and value is not None and value.requires_grad
        for value in (hidden_ND, student.weight_VD, student.bias_V)
    ]
    labels = label_N if cross_entropy_share else None
    likely_ids = torch.empty(0, dtype=torch.int64, device=hidden_ND.device)
    if rounds(hidden_ND):
        likely_ids = _likely_ids(label_N, _shared_vocab(student, targets))
    loss = Loss(KERNELS[kind], temperature, mix, cross_entropy_share, labels, likely_ids, expected)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the dtypes are chosen here, op by op
        return _Fused.apply(
            hidden_ND, student.weight_VD, student.bias_V, student, targets, loss, needs, num_tokens, chunk_tokens
        )


def _shared_vocab(student: Head, targets: Targets) -> int:
    mine = len(student.weight_VD)
    return min(mine, len(targets.head.weight_VD)) if isinstance(targets, Dense) else mine


def _likely_ids(label_N: Tensor | None, vocab: int) -> Tensor:
    """What follows one token of a text is likely behind others too. Without labels, the first ids: tokenizers give them
    to frequent words."""
    ids = torch.arange(vocab) if label_N is None else label_N.unique()
    return ids[ids < vocab][:LIKELY_IDS]


def _check(
    kind: str, targets: Targets, vocab: int, label_N: Tensor | None, cross_entropy_share: float, chunk_tokens: int
) -> None:
    if kind not in KERNELS:
        raise ValueError(f"no divergence {kind!r}; there are {', '.join(KERNELS)}")
    if kind != "forward_kl" and not isinstance(targets, Dense):
        raise ValueError(f"{kind} needs the teacher's whole distribution; {type(targets).__name__} gives forward_kl")
    if isinstance(targets, TopK) and targets.ids_NK.shape[1] >= vocab:
        raise ValueError(f"{targets.ids_NK.shape[1]} ids of {vocab} leave nothing for the bucket of the others")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    if not 0 <= cross_entropy_share <= 1:
        raise ValueError(f"cross_entropy_share is {cross_entropy_share}; it must lie between 0 and 1")
    if cross_entropy_share and label_N is None:
        raise ValueError("a cross-entropy needs label_N")


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        student: Head,
        targets: Targets,
        loss: Loss,
        needs: list[bool],
        num_tokens: int,
        chunk_tokens: int,
    ) -> Tensor:
        tokens, dtype = len(hidden_ND), hidden_ND.dtype
        shared = _shared_vocab(student, targets)
        if isinstance(targets, Dense):
            targets = Dense(targets.hidden_NE.detach().to(dtype), _read(targets.head, shared, dtype))
        student = _read(student, shared, dtype)
        chunk_tokens = min(chunk_tokens, max(tokens, 1))
        size = min(ROW_TOKENS, chunk_tokens)
        rows_of = RowBlocks(hidden_ND, student, targets, loss, size=size, vocab=shared)
        factor = loss.temperature * student.scale / num_tokens
        G_CV = hidden_ND.new_empty(chunk_tokens if any(needs) else 0, shared)
        dH_ND = torch.empty_like(hidden_ND) if needs[0] else None
        # One chunk writes its dW; several add to it in float32.
        alone = tokens <= chunk_tokens and weight_VD.dtype == dtype
        dW_VD = torch.empty_like(weight_VD, dtype=dtype if alone else torch.float32) if needs[1] else None
        if dW_VD is not None:
            dW_VD[shared if alone and tokens else 0 :].zero_()
        db_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if needs[2] else None
        loss_N = hidden_ND.new_empty(tokens, dtype=torch.float32)

        for begin in range(0, tokens, chunk_tokens):
            end = min(begin + chunk_tokens, tokens)
            for start in range(begin, end, ROW_TOKENS):
                stop = min(start + ROW_TOKENS, end)
                G_RV = G_CV[start - begin : stop - begin] if any(needs) else None
                loss_N[start:stop] = rows_of(slice(start, stop), G_RV, factor)
            if db_V is not None:
                db_V[:shared] += G_CV[: end - begin].sum(0, dtype=torch.float32)
            if dH_ND is not None:
                # As (Wᵀ Gᵀ)ᵀ it takes a fifth less on a CPU.
                dH_ND[begin:end] = torch.mm(student.weight_VD.T, G_CV[: end - begin].T).T
            if dW_VD is not None and alone:
                torch.mm(G_CV[: end - begin].T, hidden_ND[begin:end], out=dW_VD[:shared])
            elif dW_VD is not None:
                _add_weight_gradient(dW_VD[:shared], G_CV[: end - begin], hidden_ND[begin:end])

        ctx.save_for_backward(
            dH_ND,
            None if dW_VD is None else dW_VD.to(weight_VD.dtype),
            None if db_V is None or bias_V is None else db_V.to(bias_V.dtype),
        )
        return loss_N.sum() / num_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # On a CPU it costs nothing to see that there is nothing to multiply by, and a pass over the head not to.
        if grad_loss.device.type != "cpu" or grad_loss != 1:
            # In place: a second backward through the same graph is refused by autograd's version check, not wrong.
            gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return (*gradients, *[None] * 6)


def _add_weight_gradient(dW_VD: Tensor, G_CV: Tensor, hidden_CD: Tensor) -> None:
    """dW += Gᵀ H"""
    for start in range(0, len(dW_VD), VOCAB_BLOCK):
        dW_VD[start : start + VOCAB_BLOCK] += torch.mm(G_CV[:, start : start + VOCAB_BLOCK].T, hidden_CD)


def _read(head: Head, vocab: int, dtype: torch.dtype) -> Head:
    """The first `vocab` rows of a head, detached, in the dtype of the hidden states."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()[:vocab]
    return dataclasses.replace(head, weight_VD=head.weight_VD.detach()[:vocab].to(dtype), bias_V=bias_V)
