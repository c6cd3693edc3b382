"""The fused loss of a few tokens: their logits, a block of rows at a time, and what the kernels make of them.

Logits and softmax are fp32 always, although the models compute in bf16. R rows (tokens) of a block · r of those in the
cache · V vocabulary · D hidden channels of the student, E of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prunus import kernels
from prunus.head import Dense, Head, Targets
from prunus.kernels import Kernel, Rows

ROW_TOKENS = 512
"""Tokens whose logits come from one GEMM. Fewer make it slow, more cost memory."""
CACHED_TOKENS = 16
"""Tokens whose fp32 logits are worked on at once on a CPU, so that its cache holds them between the passes."""
ROUNDING = 6.0
"""How much the gradient bears of what rounding does to the logits, see `RowBlocks._is_fine`: r adds about 0.0015 √r
to its error. The rounding of G is another 0.002."""
CHECKED_TOKENS = 64
"""Tokens that stand for all of a call in that. The gradient is that of a few tokens mostly, so that of 16 it would be
underestimated mostly."""
LIKELY_IDS = 1024
"""Ids at most among which the largest logit of a token is sought."""
FAR = 0.3
"""A forward KL from which on the first way is nearly always fine (0.2 is the edge)."""


class Loss(NamedTuple):
    """What is computed of the logits.

    Attributes:
        label_N: for the cross-entropy; None without one.
        likely_ids: ids among which a token's likely ones may be; read where a GEMM `rounds`. They save time.
        expected: about what it will come to, or None. Being right saves time.
    """

    kernel: Kernel
    temperature: float
    mix: float
    cross_entropy_share: float
    label_N: Tensor | None
    likely_ids: Tensor
    expected: float | None = None


class _Logits(NamedTuple):
    """Logits before bias, scale and soft-cap, less `shift_R`: fp32 in `base_RV`, or bf16 there and, for what its
    rounding took off, in `rest_RV`."""

    base_RV: Tensor
    rest_RV: Tensor | None = None
    shift_R: Tensor | None = None

    def rows(self, rows: Rows) -> _Logits:
        rest_RV, shift_R = (None if part is None else part[rows] for part in self[1:])
        return _Logits(self.base_RV[rows], rest_RV, shift_R)

    @property
    def rounded_RV(self) -> Tensor:
        """What was rounded: the error is 2⁻⁹ of it."""
        return self.base_RV if self.rest_RV is None else self.rest_RV


class _Side(NamedTuple):
    """Student or teacher on the rows of a block, and memory for its logits."""

    hidden_RD: Tensor
    head: Head
    likely_lD: Tensor
    memory: _Logits


class _Buffers(NamedTuple):
    """Made once per call: on a CPU a fresh [R, V] costs more in page faults than the arithmetic on it. The student's
    come first."""

    logits: list[_Logits]
    fp32: list[Tensor]
    spare_rV: Tensor


class RowBlocks:
    """Loss of a row block, float32 [R], and `factor` times its G = ∂loss/∂(u T), written to `G_RV`.

    Of the ways to the logits, `_WAYS`, the first is taken whose rounding the gradient bears.
    """

    def __init__(
        self, hidden_ND: Tensor, student: Head, targets: Targets, loss: Loss, *, size: int, vocab: int
    ) -> None:
        self.targets, self.loss = targets, loss
        self.sides = [(hidden_ND, student)]
        if isinstance(targets, Dense):
            self.sides.append((targets.hidden_NE, targets.head))
        self.likely = [head.weight_VD[loss.likely_ids] for _, head in self.sides]
        self.buffers = _allocate(size, vocab, sides=len(self.sides), like=hidden_ND)
        # A way that is probably fine is tried on the first rows, which need it anyway; others on a few of all.
        self.on_trust = self._rounds() and size >= CHECKED_TOKENS and loss.expected is not None and loss.expected > FAR
        self.way = _WAYS[len(self.sides)][0] if self.on_trust else self._first_fine_way(len(hidden_ND))

    def __call__(self, rows: slice, G_RV: Tensor | None, factor: float) -> Tensor:
        size = len(self.buffers.spare_rV)
        logits = self._logits(rows)
        loss_R = self.buffers.spare_rV.new_empty(rows.stop - rows.start)
        for start in range(0, len(loss_R), size):
            part = slice(start, min(start + size, len(loss_R)))
            whole = slice(rows.start + part.start, rows.start + part.stop)
            loss_R[part], G_rV = self._loss(whole, self._finish([each.rows(part) for each in logits]))
            if G_RV is not None:
                G_RV[part] = G_rV.mul_(factor)
        return loss_R

    def _logits(self, rows: slice) -> list[_Logits]:
        logits = self.way(self._at(rows))
        if self.on_trust:
            self.on_trust = False
            some = self._few(rows.stop - rows.start)
            if not self._is_fine([each.rows(some) for each in logits], rows.start + some):
                self.way = self._first_fine_way(len(self.sides[0][0]))
                logits = self.way(self._at(rows))
        return logits

    def _rounds(self) -> bool:
        return self.buffers.logits[0].rest_RV is not None

    def _few(self, tokens: int) -> Tensor:
        return torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS, len(self.buffers.logits[0].base_RV))).long()

    def _first_fine_way(self, tokens: int) -> _Way:
        if not self._rounds() or tokens == 0:
            return _exact
        some = self._few(tokens)
        return next((way for way in _WAYS[len(self.sides)] if self._is_fine(way(self._at(some)), some)), _exact)

    def _is_fine(self, logits: list[_Logits], some: Tensor) -> bool:
        """Whether 2⁻⁹ of what was rounded, a, is small beside the gradient: Σ (q a)², and Σ (p a)² of the teacher's,
        against Σ G²."""
        noise, signal = torch.zeros(()), torch.zeros(())
        size = len(self.buffers.spare_rV)
        for start in range(0, len(some), size):
            parts = [each.rows(slice(start, start + size)) for each in logits]
            finished = self._finish(parts)
            for part, z_rV, (_, head) in zip(parts, finished, self.sides, strict=True):
                errors_rV = torch.softmax(z_rV, dim=-1).mul_(part.rounded_RV)
                noise = noise + errors_rV.mul_(head.scale / self.loss.temperature).square_().sum()
            _, G_rV = self._loss(some[start : start + size], finished)
            signal = signal + G_rV.square().sum()
        return bool(noise <= ROUNDING * signal)

    def _at(self, rows: Rows) -> list[_Side]:
        return [
            _Side(hidden_ND[rows], head, likely_lD, memory.rows(slice(len(hidden_ND[rows]))))
            for (hidden_ND, head), likely_lD, memory in zip(self.sides, self.likely, self.buffers.logits, strict=True)
        ]

    def _finish(self, logits: Sequence[_Logits]) -> list[Tensor]:
        """The logits of r rows, divided by the temperature, in the fp32 buffers."""
        finished = []
        for each, (_, head), out_rV in zip(logits, self.sides, self.buffers.fp32, strict=True):
            finished.append(out_rV[: len(each.base_RV)])
            spare_rV = self.buffers.spare_rV[: len(each.base_RV)]
            _finish_logits(each, head, self.loss.temperature, out=finished[-1], spare_rV=spare_rV)
        return finished

    def _loss(self, rows: Rows, finished: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and G of r rows; G lies where the student's logits lay."""
        kernel, temperature, mix, share, label_N, *_ = self.loss
        s_rV, softcap = finished[0], self.sides[0][1].softcap
        slope_rV = None if softcap is None else 1 - (s_rV * (temperature / softcap)).square_()
        hard = None if label_N is None else kernels.cross_entropy(s_rV * temperature, label_N[rows])
        if isinstance(self.targets, Dense):
            loss_r = kernel(finished[1], s_rV, self.buffers.spare_rV[: len(s_rV)], mix)
        else:
            loss_r = kernels.sparse_(self.targets, rows, s_rV)
        loss_r = temperature**2 * loss_r
        if hard is not None:
            entropy_r, hard_rV = hard
            loss_r = (1 - share) * loss_r + share * entropy_r
            s_rV.mul_(1 - share).add_(hard_rV, alpha=share / temperature)
        if slope_rV is not None:
            s_rV.mul_(slope_rV)
        return loss_r, s_rV


_Way = Callable[[list[_Side]], list[_Logits]]


def _shifted(sides: list[_Side]) -> list[_Logits]:
    """One GEMM each: the logits less their largest, or nearly. Rounding to bf16 takes 2⁻⁹ of that, which is little for
    the likely ids, and a softmax sees no more of the others than of their probability."""
    logits = []
    for hidden_RD, head, likely_lD, memory in sides:
        shift_R = (hidden_RD @ likely_lD.T).amax(-1)
        base_RV = memory.base_RV.copy_(shift_R[:, None])
        logits.append(_Logits(base_RV.addmm_(hidden_RD, head.weight_VD.T, beta=-1), shift_R=shift_R))
    return logits


def _by_difference(sides: list[_Side]) -> list[_Logits]:
    """Three GEMMs: the teacher's exactly, and of the student's the difference from them, which shrinks as the gradient
    does. What all logits of a row differ by is taken off first: a softmax does not see it, but its rounding."""
    student, teacher = sides
    exact = _exact([teacher])[0]
    largest_R, above_R = ((side.hidden_RD @ side.likely_lD.T).amax(-1) for side in sides)
    base_RV = torch.sub(exact.base_RV, (above_R - largest_R)[:, None], out=student.memory.base_RV)
    return [_Logits(base_RV, _rest(student, base_RV)), exact]


def _exact(sides: list[_Side]) -> list[_Logits]:
    """Two GEMMs each, base = bf16(h Wᵀ) and what its rounding took off, to 2⁻¹⁸ of the logit: as long as one in fp32
    (Zen 4), and with no fp32 copy of the head. CUDA writes fp32 in the first place."""
    logits = []
    for side in sides:
        hidden_RD, weight_VD, base_RV = side.hidden_RD, side.head.weight_VD, side.memory.base_RV
        if side.memory.rest_RV is not None:
            torch.mm(hidden_RD, weight_VD.T, out=base_RV)
            logits.append(_Logits(base_RV, _rest(side, base_RV)))
            continue
        if hidden_RD.is_cuda and hidden_RD.dtype != torch.float32:
            torch.mm(hidden_RD, weight_VD.T, out_dtype=torch.float32, out=base_RV)
        else:
            torch.mm(hidden_RD.float(), weight_VD.T.float(), out=base_RV)
        logits.append(_Logits(base_RV))
    return logits


def _rest(side: _Side, base_RV: Tensor) -> Tensor:
    """bf16(h Wᵀ − base): the GEMM subtracts inside its fp32 accumulator, so the error is 2⁻⁹ of the rest."""
    assert side.memory.rest_RV is not None
    return torch.addmm(base_RV, side.hidden_RD, side.head.weight_VD.T, beta=-1, out=side.memory.rest_RV)


_WAYS: dict[int, list[_Way]] = {1: [_shifted], 2: [_shifted, _by_difference]}
"""Ways to the logits of student alone, and of student and teacher, for a CPU whose bf16 GEMM rounds what it returns to
8 bits: near the teacher that is more than the gradient. Each has a GEMM more than the one before; the last, if none of
these is fine enough, is `_exact`."""


def _finish_logits(logits: _Logits, head: Head, temperature: float, *, out: Tensor, spare_rV: Tensor) -> None:
    """Sum of the two parts, bias, scale, soft-cap and temperature, into `out`. A shift stays off unless there is a
    soft-cap: no divergence sees it."""
    out.copy_(logits.base_RV)
    if logits.rest_RV is not None:
        out.add_(spare_rV.copy_(logits.rest_RV))  # adding bf16 to fp32 directly would allocate
    if logits.shift_R is not None and head.softcap is not None:
        out.add_(logits.shift_R[:, None])
    if head.bias_V is not None:
        out.add_(head.bias_V)
    if head.scale != 1:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature != 1:
        out.div_(temperature)


def rounds(like: Tensor) -> bool:
    """Whether a GEMM of such tensors returns bf16, and nothing finer can be had of it."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _allocate(rows: int, vocab: int, *, sides: int, like: Tensor) -> _Buffers:
    two_parts = rounds(like)
    dtype = torch.bfloat16 if two_parts else torch.float32
    logits = [
        _Logits(like.new_empty(rows, vocab, dtype=dtype), like.new_empty(rows, vocab) if two_parts else None)
        for _ in range(sides)
    ]
    cached = min(rows, CACHED_TOKENS) if like.device.type == "cpu" else rows
    *fp32, spare_rV = (like.new_empty(cached, vocab, dtype=torch.float32) for _ in range(sides + 1))
    return _Buffers(logits, fp32, spare_rV)
