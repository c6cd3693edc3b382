"""The fused loss of a few tokens: their exact logits, a block of rows at a time, and what the kernels make of them.

Logits and softmax are fp32 always, although the models compute in bf16. R rows (tokens) of a block · r of those in the
cache · V vocabulary · D hidden channels of the student.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunus import kernels
from prunus.head import Dense, Head, Targets
from prunus.kernels import Kernel

ROW_TOKENS = 256
"""Tokens whose logits come from one GEMM. Fewer make it slow, more cost memory."""
CACHED_TOKENS = 16
"""Tokens whose fp32 logits are worked on at once on a CPU, so that its cache holds them between the passes."""
FAR = 16.0
"""The student's logits are computed apart from the teacher's where `RowBlocks._is_far` says so. 16 adds at most 0.3 %
to the error of the gradient; the rounding of G is another 0.3 %."""
SAMPLED_ROWS = 64
"""Every so many rows of a head stand for all, where the mean of the logits is wanted roughly."""


class Loss(NamedTuple):
    """What is computed of the logits."""

    kernel: Kernel
    temperature: float
    mix: float
    cross_entropy_share: float
    label_N: Tensor | None


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


class RowBlocks:
    """Loss of a row block, float32 [R], and G = ∂loss/∂(u T) of it, written to `G_RV`."""

    def __init__(self, student: Head, targets: Targets, loss: Loss, *, size: int, vocab: int, like: Tensor) -> None:
        self.student, self.targets, self.loss = student, targets, loss
        self.buffers = _allocate(size, vocab, like=like)
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
