"""Forward KL from hidden states: chunked, gradients in the forward pass, [tokens, vocabulary] never whole.

N tokens · C of a chunk · R of a row block · r of those in the cache · V vocabulary · v a block of it · D hidden
channels of the student, E of the teacher. The readable twin is `losses.forward_kl(losses.head_logits(...), ...)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prunus import losses

CHUNK_TOKENS = 1024
"""Tokens whose G is kept at once. Fewer cost passes over the [V, D] gradient of the head, more cost memory."""
ROW_TOKENS = 256
"""Tokens whose logits come from one GEMM. Fewer make it slow, more cost memory."""
CACHED_TOKENS = 16
"""Tokens whose fp32 logits are worked on at once on a CPU, so that its cache holds them between the passes."""
VOCAB_BLOCK = 8192
"""Rows of the head whose gradient is added at once, so that the product is still in the cache when it is added."""
FAR = 4.0
"""The student's logits are computed apart from the teacher's once E[Δ²] exceeds this many KL (see `_is_far`)."""


@dataclasses.dataclass(frozen=True)
class Head:
    """An output head and what happens to its logits (see `losses.head_logits`).

    Attributes:
        weight_VD: rows of the head; the tied embedding if it is tied. In the dtype of the hidden states it is read in
            place, otherwise it is copied at each call.
        bias_V: or None.
        softcap: or None.
        scale: factor on the logits.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


class _Logits(NamedTuple):
    """Logits of R tokens before bias, scale and soft-cap: fp32 in `base`, or the sum of two bf16 (see `_matmul`)."""

    base_RV: Tensor
    rest_RV: Tensor | None

    def rows(self, rows: slice) -> _Logits:
        return _Logits(self.base_RV[rows], None if self.rest_RV is None else self.rest_RV[rows])


class _Buffers(NamedTuple):
    """Made once per call: on a CPU a fresh [R, V] costs more in page faults than the arithmetic on it."""

    teacher: _Logits
    student: _Logits
    t_rV: Tensor
    s_rV: Tensor
    p_rV: Tensor


def forward_kl(
    student_hidden_ND: Tensor,
    student: Head,
    teacher_hidden_NE: Tensor,
    teacher: Head,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    mask_N: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """KL(teacher ‖ student) as in `losses.forward_kl`, with gradients to the student's hidden states and head.

        G = T · scale · (q − p) ⊙ softcap′ / num_tokens,   dH = G W,   dW = Gᵀ H,   db = Σ_n G

    Logits and softmax are fp32 always; G is rounded to the dtype of the hidden states for its two GEMMs. With bf16
    that costs about 0.2 % of the gradient however near the student is to its teacher, where bf16 logits cost up to
    34 %. Everything is read in the dtype of the student's hidden states, as under autocast. A head that does not
    require grad gets no dW. Nothing flows to the teacher. One backward pass only: it spends the gradients.

    Args:
        student_hidden_ND, teacher_hidden_NE: states after the last norm, of the same tokens; bf16 or fp32.
        student, teacher: the heads; vocabularies of different size are cut to the ids they share.
        num_tokens: valid tokens of the whole step, over all micro-batches and ranks.
        temperature: T > 0; T² on the loss, T on the gradient.
        mask_N: bool [N], True for the tokens that count; None counts all.
        chunk_tokens: tokens whose G is kept at once, `chunk_tokens` × V × 2 bytes in bf16.
    Returns:
        float32 scalar.
    Raises:
        ValueError: different numbers of tokens, num_tokens < 1, temperature <= 0 or chunk_tokens < 1.
    """
    losses.check_arguments(len(student_hidden_ND), len(teacher_hidden_NE), mask_N, num_tokens, temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    if mask_N is not None:
        student_hidden_ND, teacher_hidden_NE = student_hidden_ND[mask_N], teacher_hidden_NE[mask_N]
    # Under no_grad the Function would not know, and compute gradients for nobody.
    needs = [
        torch.is_grad_enabled() and value is not None and value.requires_grad
        for value in (student_hidden_ND, student.weight_VD, student.bias_V)
    ]
    trained = (student_hidden_ND, student.weight_VD, student.bias_V)
    settings = (needs, num_tokens, temperature, chunk_tokens)
    with torch.autocast(student_hidden_ND.device.type, enabled=False):  # the dtypes are chosen here, op by op
        return _ForwardKL.apply(*trained, student, teacher_hidden_NE.detach(), teacher, *settings)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        student: Head,
        teacher_hidden_NE: Tensor,
        teacher: Head,
        needs: list[bool],
        num_tokens: int,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        tokens, dtype = len(hidden_ND), hidden_ND.dtype
        shared = min(len(weight_VD), len(teacher.weight_VD))
        student, teacher = _read(student, shared, dtype), _read(teacher, shared, dtype)
        teacher_hidden_NE = teacher_hidden_NE.to(dtype)
        chunk_tokens = min(chunk_tokens, max(tokens, 1))
        buffers = _allocate(min(ROW_TOKENS, chunk_tokens), shared, like=hidden_ND)
        G_CV = hidden_ND.new_empty(chunk_tokens if any(needs) else 0, shared)
        dH_ND = torch.empty_like(hidden_ND) if needs[0] else None
        dW_dtype = weight_VD.dtype if tokens <= chunk_tokens else torch.float32  # fp32 to sum over chunks
        dW_VD = torch.zeros_like(weight_VD, dtype=dW_dtype) if needs[1] else None
        db_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if needs[2] else None
        kl_N = hidden_ND.new_empty(tokens, dtype=torch.float32)
        factor = temperature * student.scale / num_tokens

        near = True
        for begin in range(0, tokens, chunk_tokens):
            end = min(begin + chunk_tokens, tokens)
            for start in range(begin, end, ROW_TOKENS):
                stop = min(start + ROW_TOKENS, end)
                block = (hidden_ND[start:stop], student, teacher_hidden_NE[start:stop], teacher, temperature, buffers)
                G_RV = G_CV[start - begin : stop - begin] if any(needs) else None
                kl_N[start:stop], near = _row_block(*block, G_RV, near)
            if db_V is not None:
                db_V[:shared] += G_CV[: end - begin].sum(0, dtype=torch.float32)
            if dH_ND is not None:
                torch.mm(G_CV[: end - begin], student.weight_VD, out=dH_ND[begin:end])
            if dW_VD is not None:
                _add_weight_gradient(dW_VD[:shared], G_CV[: end - begin], hidden_ND[begin:end], factor)

        ctx.save_for_backward(
            None if dH_ND is None else dH_ND.mul_(factor),
            None if dW_VD is None else dW_VD.to(weight_VD.dtype),
            None if db_V is None or bias_V is None else db_V.mul_(factor).to(bias_V.dtype),
        )
        return temperature**2 * kl_N.sum() / num_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward through the same graph is refused by autograd's version check, not wrong.
        gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.saved_tensors]
        return (*gradients, *[None] * 7)


def _row_block(
    hidden_RD: Tensor,
    student: Head,
    teacher_hidden_RE: Tensor,
    teacher: Head,
    temperature: float,
    buffers: _Buffers,
    G_RV: Tensor | None,
    near: bool,
) -> tuple[Tensor, bool]:
    """KL of each row, float32 [R], and whether the student is near its teacher; writes q − p to `G_RV`."""
    count = len(hidden_RD)
    teacher_logits = _matmul(teacher_hidden_RE, teacher.weight_VD, buffers.teacher.rows(slice(count)))
    base_RV = teacher_logits.base_RV if near else None
    student_logits = _matmul(hidden_RD, student.weight_VD, buffers.student.rows(slice(count)), base_RV)
    kl_R, mean_R = buffers.t_rV.new_empty(2, count)
    for start in range(0, count, len(buffers.t_rV)):
        rows = slice(start, min(start + len(buffers.t_rV), count))
        t_rV, s_rV, p_rV = (buffer[: rows.stop - rows.start] for buffer in (buffers.t_rV, buffers.s_rV, buffers.p_rV))
        _finish_logits(teacher_logits.rows(rows), teacher, temperature, out=t_rV, spare_rV=p_rV)
        _finish_logits(student_logits.rows(rows), student, temperature, out=s_rV, spare_rV=p_rV)
        kl_R[rows], mean_R[rows] = _kl_and_gradient_(t_rV, s_rV, p_rV, student.softcap, temperature)
        if G_RV is not None:
            G_RV[rows] = s_rV
    if near and teacher_logits.rest_RV is not None and _is_far(kl_R, mean_R):
        return _row_block(hidden_RD, student, teacher_hidden_RE, teacher, temperature, buffers, G_RV, near=False)
    return kl_R, near


def _matmul(hidden_RD: Tensor, weight_VD: Tensor, out: _Logits, base_RV: Tensor | None = None) -> _Logits:
    """hidden @ weightᵀ to fp32 precision, although a CPU's bf16 GEMM rounds its results to bf16.

        base = bf16(h Wᵀ),   rest = bf16(h Wᵀ − base),   h Wᵀ ≈ base + rest

    The second GEMM subtracts base inside its fp32 accumulator, so the error is 2⁻⁹ of rest: 2⁻¹⁸ of the logit with
    its own base. With the teacher's as `base_RV` one GEMM is saved, and the error is 2⁻⁹ of the difference between
    student and teacher, which shrinks as the gradient does. Two bf16 GEMMs take as long as one in fp32 (Zen 4) and
    need no fp32 copy of the head. CUDA writes fp32 in the first place.
    """
    if out.rest_RV is None:
        if hidden_RD.is_cuda and hidden_RD.dtype != torch.float32:
            torch.mm(hidden_RD, weight_VD.T, out_dtype=torch.float32, out=out.base_RV)
        else:
            torch.mm(hidden_RD.float(), weight_VD.T.float(), out=out.base_RV)
        return out
    if base_RV is None:
        base_RV = torch.mm(hidden_RD, weight_VD.T, out=out.base_RV)
    torch.addmm(base_RV, hidden_RD, weight_VD.T, beta=-1, out=out.rest_RV)
    return _Logits(base_RV, out.rest_RV)


def _finish_logits(logits: _Logits, head: Head, temperature: float, *, out: Tensor, spare_rV: Tensor) -> None:
    """Sum of the two parts, bias, scale, soft-cap and temperature, into `out`."""
    out.copy_(logits.base_RV)
    if logits.rest_RV is not None:
        out.add_(spare_rV.copy_(logits.rest_RV))  # adding bf16 to fp32 directly would allocate
    if head.bias_V is not None:
        out.add_(head.bias_V)
    if head.scale != 1:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature != 1:
        out.div_(temperature)


def _kl_and_gradient_(
    t_RV: Tensor, s_RV: Tensor, p_RV: Tensor, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL and Σ_v p (t − s) of each row, float32 [R]; leaves q − p, through the soft-cap, in s, and spends t.

        KL = Σ_v p (t − s) − lse(t) + lse(s)

    The log-sum-exp comes without a pass of exp of its own: max z − lse = log max softmax(z).
    """
    max_t_R, max_s_R = t_RV.amax(-1), s_RV.amax(-1)
    torch.softmax(t_RV, dim=-1, out=p_RV)
    mean_R = t_RV.sub_(s_RV).mul_(p_RV).sum(-1)
    if softcap is not None:
        slope_RV = t_RV.copy_(s_RV).mul_(temperature / softcap).square_().neg_().add_(1)
    q_RV = torch.softmax(s_RV, dim=-1, out=s_RV)
    kl_R = mean_R + (max_s_R - q_RV.amax(-1).log()) - (max_t_R - p_RV.amax(-1).log())
    q_RV.sub_(p_RV)
    if softcap is not None:
        q_RV.mul_(slope_RV)
    return kl_R, mean_R


def _is_far(kl_R: Tensor, mean_R: Tensor) -> bool:
    """Whether 2⁻⁹ of Δ = t − s is too coarse beside the gradient.

    E_p[Δ²] is about mean² + 2 KL. The gradient sees the spread of Δ alone, also about 2 KL, and ends growing near
    KL = 1. A shift that all logits share, or a student far away, makes the first outgrow the second.
    """
    squares = (mean_R.square() + 2 * kl_R).mean()
    return bool(squares > FAR * kl_R.mean().clamp(max=1))


def _add_weight_gradient(dW_VD: Tensor, G_CV: Tensor, hidden_CD: Tensor, factor: float) -> None:
    """dW += factor · Gᵀ H"""
    for start in range(0, len(dW_VD), VOCAB_BLOCK):
        product_vD = torch.mm(G_CV[:, start : start + VOCAB_BLOCK].T, hidden_CD)
        dW_VD[start : start + VOCAB_BLOCK].add_(product_vD, alpha=factor)


def _read(head: Head, vocab: int, dtype: torch.dtype) -> Head:
    """The first `vocab` rows of a head, detached, in the dtype of the hidden states."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()[:vocab]
    return dataclasses.replace(head, weight_VD=head.weight_VD.detach()[:vocab].to(dtype), bias_V=bias_V)


def _allocate(rows: int, vocab: int, *, like: Tensor) -> _Buffers:
    on_cpu = like.device.type == "cpu"
    two_parts = on_cpu and like.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if two_parts else torch.float32
    teacher, student = (
        _Logits(like.new_empty(rows, vocab, dtype=dtype), like.new_empty(rows, vocab) if two_parts else None)
        for _ in range(2)
    )
    cached = min(rows, CACHED_TOKENS) if on_cpu else rows
    t_rV, s_rV, p_rV = (like.new_empty(cached, vocab, dtype=torch.float32) for _ in range(3))
    return _Buffers(teacher, student, t_rV, s_rV, p_rV)
