"""The losses from hidden states: chunked, gradients in the forward pass, [tokens, vocabulary] never whole.

The readable twins are in `losses`, on `losses.head_logits(...)`. Logits and softmax are fp32 always; G, the gradient to
the logits, is rounded to the dtype of the hidden states for its two GEMMs. With bf16 that costs about 0.2 % of the
gradient however near the student is to its teacher, where bf16 logits cost up to 34 %.

N tokens · C of a chunk · R of a row block · r of those in the cache · V vocabulary · v a block of it · D hidden
channels of the student, E of the teacher · K kept ids or samples of a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from prunus import hardware, kernels, losses
from prunus.kernels import KERNELS, Kernel, Samples, TopK

CHUNK_TOKENS = 1024
"""Tokens whose G is kept at once. Fewer cost passes over the [V, D] gradient of the head, more cost memory."""
ROW_TOKENS = 256
"""Tokens whose logits come from one GEMM. Fewer make it slow, more cost memory."""
CACHED_TOKENS = 16
"""Tokens whose fp32 logits are worked on at once on a CPU, so that its cache holds them between the passes."""
VOCAB_BLOCK = 8192
"""Rows of the head whose gradient is added at once, so that the product is still in the cache when it is added."""
FAR = 16.0
"""The student's logits are computed apart from the teacher's where `_Rows._is_far` says so. 16 adds at most 0.3 % to
the error of the gradient; the rounding of G is another 0.3 %."""
SAMPLED_ROWS = 64
"""Every so many rows of a head stand for all, where the mean of the logits is wanted roughly."""


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

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V], not rounded to the dtype of the hidden states. For a few tokens: they are whole."""
        logits_NV = hardware.matmul_float32(hidden_ND, self.weight_VD.T)
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V
        logits_NV = self.scale * logits_NV
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """A transformers model's output head."""
    module = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(module.weight, getattr(module, "bias", None), softcap)


@dataclasses.dataclass(frozen=True)
class Dense:
    """The teacher's whole distribution: its states after the last norm, [N, E], and its head."""

    hidden_NE: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_NE)

    def masked(self, mask_N: Tensor) -> Dense:
        return dataclasses.replace(self, hidden_NE=self.hidden_NE[mask_N])


Targets = Dense | TopK | Samples
"""What a student is trained on: all that a loss needs of the teacher."""


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
        label_N: the id that follows each position, int64; read where `cross_entropy_share` is not 0.
        cross_entropy_share: c in [0, 1].
        chunk_tokens: tokens whose G is kept at once, `chunk_tokens` × V × 2 bytes in bf16.
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
    loss = _Loss(KERNELS[kind], temperature, mix, cross_entropy_share, labels)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the dtypes are chosen here, op by op
        return _Fused.apply(
            hidden_ND, student.weight_VD, student.bias_V, student, targets, loss, needs, num_tokens, chunk_tokens
        )


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


class _Loss(NamedTuple):
    """What is computed of the logits."""

    kernel: Kernel
    temperature: float
    mix: float
    cross_entropy_share: float
    label_N: Tensor | None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        student: Head,
        targets: Targets,
        loss: _Loss,
        needs: list[bool],
        num_tokens: int,
        chunk_tokens: int,
    ) -> Tensor:
        tokens, dtype = len(hidden_ND), hidden_ND.dtype
        shared = len(weight_VD)
        if isinstance(targets, Dense):
            shared = min(shared, len(targets.head.weight_VD))
            targets = Dense(targets.hidden_NE.detach().to(dtype), _read(targets.head, shared, dtype))
        student = _read(student, shared, dtype)
        chunk_tokens = min(chunk_tokens, max(tokens, 1))
        rows_of = _Rows(student, targets, loss, _allocate(min(ROW_TOKENS, chunk_tokens), shared, like=hidden_ND))
        G_CV = hidden_ND.new_empty(chunk_tokens if any(needs) else 0, shared)
        dH_ND = torch.empty_like(hidden_ND) if needs[0] else None
        # One chunk writes its dW; several add to it in float32.
        alone = tokens <= chunk_tokens and weight_VD.dtype == dtype
        dW_VD = torch.empty_like(weight_VD, dtype=dtype if alone else torch.float32) if needs[1] else None
        if dW_VD is not None:
            dW_VD[shared if alone and tokens else 0 :].zero_()
        db_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if needs[2] else None
        loss_N = hidden_ND.new_empty(tokens, dtype=torch.float32)
        factor = loss.temperature * student.scale / num_tokens

        for begin in range(0, tokens, chunk_tokens):
            end = min(begin + chunk_tokens, tokens)
            for start in range(begin, end, ROW_TOKENS):
                stop = min(start + ROW_TOKENS, end)
                G_RV = G_CV[start - begin : stop - begin] if any(needs) else None
                loss_N[start:stop] = rows_of(hidden_ND[start:stop], slice(start, stop), G_RV)
            if db_V is not None:
                db_V[:shared] += G_CV[: end - begin].sum(0, dtype=torch.float32)
            if dH_ND is not None:
                # As Wᵀ Gᵀ: with the short side first, CPUs' GEMM is a quarter faster.
                dH_ND[begin:end] = _product(student.weight_VD.T, G_CV[: end - begin].T, factor).T
            if dW_VD is not None and alone:
                _product(G_CV[: end - begin].T, hidden_ND[begin:end], factor, out=dW_VD[:shared])
            elif dW_VD is not None:
                _add_weight_gradient(dW_VD[:shared], G_CV[: end - begin], hidden_ND[begin:end], factor)

        ctx.save_for_backward(
            dH_ND,
            None if dW_VD is None else dW_VD.to(weight_VD.dtype),
            None if db_V is None or bias_V is None else db_V.mul_(factor).to(bias_V.dtype),
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


class _Rows:
    """Loss of a row block, float32 [R], and G = ∂loss/∂(u T) of it, written to `G_RV`."""

    def __init__(self, student: Head, targets: Targets, loss: _Loss, buffers: _Buffers) -> None:
        self.student, self.targets, self.loss, self.buffers = student, targets, loss, buffers
        self.near = isinstance(targets, Dense)
        self.means = [
            each.weight_VD[::SAMPLED_ROWS].mean(0, dtype=torch.float32)
            for each in ([targets.head, student] if isinstance(targets, Dense) else [])
        ]

    def __call__(self, hidden_RD: Tensor, rows: slice, G_RV: Tensor | None) -> Tensor:
        buffers, count = self.buffers, len(hidden_RD)
        teacher_logits, base_RV, shift_R = None, None, torch.zeros(())
        student_buffers = buffers.student.rows(slice(count))
        if isinstance(self.targets, Dense):
            weight_VD = self.targets.head.weight_VD
            teacher_logits = _matmul(self.targets.hidden_NE[rows], weight_VD, buffers.teacher.rows(slice(count)))
            if self.near and teacher_logits.rest_RV is not None:
                shift_R = self._shift(hidden_RD, rows)
                base_RV = torch.sub(teacher_logits.base_RV, shift_R[:, None], out=student_buffers.base_RV)
        student_logits = _matmul(hidden_RD, self.student.weight_VD, student_buffers, base_RV)
        loss_R = buffers.t_rV.new_empty(count)
        for start in range(0, count, len(buffers.t_rV)):
            part = slice(start, min(start + len(buffers.t_rV), count))
            self._logits(student_logits.rows(part), self.student, buffers.s_rV[: part.stop - start])
            if teacher_logits and isinstance(self.targets, Dense):
                self._logits(teacher_logits.rows(part), self.targets.head, buffers.t_rV[: part.stop - start])
            if base_RV is not None and start == 0 and self._is_far(part, shift_R):
                self.near = False
                return self(hidden_RD, rows, G_RV)
            whole = slice(rows.start + part.start, rows.start + part.stop)
            loss_R[part] = self._part(part.stop - start, whole)
            if G_RV is not None:
                G_RV[part] = buffers.s_rV[: part.stop - start]
        return loss_R

    def _shift(self, hidden_RD: Tensor, rows: slice) -> Tensor:
        """By how much the teacher's logits lie above the student's, roughly: the mean over the vocabulary, [R], in the
        short type. A softmax does not see a shift of all logits, but the rounding of their difference does."""
        assert isinstance(self.targets, Dense)
        teacher_E, student_D = self.means
        shift_R = self.targets.hidden_NE[rows].float() @ teacher_E - hidden_RD.float() @ student_D
        return shift_R.to(hidden_RD.dtype)

    def _is_far(self, part: slice, shift_R: Tensor) -> bool:
        """Whether 2⁻⁹ of Δ, by which the logits differ, is too coarse beside the gradient: Σ (q Δ)² against Σ (q − p)²
        of some rows. It is where the student is far away (q − p ends growing, Δ does not), or its logits are shifted
        against the teacher's in a way that a softmax does not see."""
        t_rV, s_rV = (buffer[: part.stop] for buffer in (self.buffers.t_rV, self.buffers.s_rV))
        q_rV = torch.softmax(s_rV, dim=-1)
        signal = (q_rV - torch.softmax(t_rV, dim=-1)).square().sum()
        shift_r1 = shift_R[part, None].float() / self.loss.temperature
        noise = (t_rV - s_rV).sub_(shift_r1).mul_(q_rV).square().sum()
        return bool(noise > FAR * signal)

    def _logits(self, logits: _Logits, head: Head, out_rV: Tensor) -> None:
        spare_rV = self.buffers.p_rV[: len(out_rV)]
        _finish_logits(logits, head, self.loss.temperature, out=out_rV, spare_rV=spare_rV)

    def _part(self, count: int, rows: slice) -> Tensor:
        """Loss of r rows; leaves G in `buffers.s_rV`."""
        kernel, temperature, mix, share, label_N = self.loss
        t_rV, s_rV, p_rV = (buffer[:count] for buffer in (self.buffers.t_rV, self.buffers.s_rV, self.buffers.p_rV))
        softcap = self.student.softcap
        slope_rV = None if softcap is None else 1 - (s_rV * (temperature / softcap)).square_()
        hard = None if label_N is None else kernels.cross_entropy(s_rV * temperature, label_N[rows])
        if isinstance(self.targets, Dense):
            loss_r = kernel(t_rV, s_rV, p_rV, mix)
        else:
            loss_r = kernels.sparse_(self.targets, rows, s_rV)
        loss_r = temperature**2 * loss_r
        if hard is not None:
            entropy_r, hard_rV = hard
            loss_r = (1 - share) * loss_r + share * entropy_r
            s_rV.mul_(1 - share).add_(hard_rV, alpha=share / temperature)
        if slope_rV is not None:
            s_rV.mul_(slope_rV)
        return loss_r


def _matmul(hidden_RD: Tensor, weight_VD: Tensor, out: _Logits, base_RV: Tensor | None = None) -> _Logits:
    """hidden @ weightᵀ to fp32 precision, although a CPU's bf16 GEMM rounds its results to bf16.

        base = bf16(h Wᵀ),   rest = bf16(h Wᵀ − base),   h Wᵀ ≈ base + rest

    The second GEMM subtracts base inside its fp32 accumulator, so the error is 2⁻⁹ of rest: 2⁻¹⁸ of the logit with
    its own base. With the teacher's (shifted) as `base_RV` one GEMM is saved, and the error is 2⁻⁹ of the difference
    between student and teacher, which shrinks as the gradient does. Two bf16 GEMMs take as long as one in fp32
    (Zen 4) and need no fp32 copy of the head. CUDA writes fp32 in the first place.
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


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor · a b, rounded once."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    return torch.addmm(out, a, b, beta=0, alpha=factor, out=out)


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
