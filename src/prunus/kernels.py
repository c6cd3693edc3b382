"""Logits of a few rows → loss and gradient: one function per divergence, in fp32, mostly in place.

What each computes is said by its twin in `losses`; here is the gradient G to the student's logits.

r rows · V vocabulary · K kept ids or samples of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunus import losses

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(teacher's logits t, student's logits s, spare memory, mix), float32 [r, V] and divided by T → the loss of each row,
[r]. Leaves the loss's gradient to s in s, and may spend t and the spare memory."""

Rows = slice | Tensor
"""Rows of the tokens, or their indices."""


def _forward_kl_(t_rV: Tensor, s_rV: Tensor, p_rV: Tensor, mix: float) -> Tensor:
    """KL = Σ_v p (t − s) − lse(t) + lse(s), G = q − p.

    The log-sum-exp comes without a pass of exp of its own: max z − lse = log max softmax(z).
    """
    max_t_r, max_s_r = t_rV.amax(-1), s_rV.amax(-1)
    torch.softmax(t_rV, dim=-1, out=p_rV)
    mean_r = t_rV.sub_(s_rV).mul_(p_rV).sum(-1)
    q_rV = torch.softmax(s_rV, dim=-1, out=s_rV)
    kl_r = mean_r + (max_s_r - q_rV.amax(-1).log()) - (max_t_r - p_rV.amax(-1).log())
    q_rV.sub_(p_rV)
    return kl_r


def _reverse_kl_(t_rV: Tensor, s_rV: Tensor, p_rV: Tensor, mix: float) -> Tensor:
    """G = q (log q − log p − KL(q ‖ p))"""
    log_p_rV, log_q_rV = _logs(t_rV, s_rV)
    above_rV = log_q_rV - log_p_rV
    q_rV = log_q_rV.exp_()
    loss_r = (q_rV * above_rV).sum(-1)
    torch.mul(q_rV, above_rV.sub_(loss_r[:, None]), out=s_rV)
    return loss_r


def _symmetric_kl_(t_rV: Tensor, s_rV: Tensor, p_rV: Tensor, mix: float) -> Tensor:
    """The mean of both."""
    reverse_rV = s_rV.clone()
    reverse_r = _reverse_kl_(t_rV, reverse_rV, p_rV, mix)
    forward_r = _forward_kl_(t_rV, s_rV, p_rV, mix)
    s_rV.add_(reverse_rV).mul_(0.5)
    return 0.5 * (forward_r + reverse_r)


def _jsd_(t_rV: Tensor, s_rV: Tensor, p_rV: Tensor, mix: float) -> Tensor:
    """G = (1 − β) q (log q − log m − KL(q ‖ m))"""
    log_p_rV, log_q_rV = _logs(t_rV, s_rV)
    log_m_rV = losses.mixture(log_p_rV, log_q_rV, mix)
    teacher_r = (log_p_rV.exp() * (log_p_rV - log_m_rV)).sum(-1)
    above_rV = log_q_rV - log_m_rV
    q_rV = log_q_rV.exp_()
    student_r = (q_rV * above_rV).sum(-1)
    torch.mul(q_rV, above_rV.sub_(student_r[:, None]), out=s_rV).mul_(1 - mix)
    return mix * teacher_r + (1 - mix) * student_r


def _skewed_kl_(t_rV: Tensor, s_rV: Tensor, p_rV: Tensor, mix: float) -> Tensor:
    """With m = α p + (1 − α) q and w = (1 − α) p q / m: G = q Σ w − w"""
    log_p_rV, log_q_rV = _logs(t_rV, s_rV)
    above_rV = log_p_rV - losses.mixture(log_p_rV, log_q_rV, mix)
    loss_r = (log_p_rV.exp_() * above_rV).sum(-1)
    w_rV = above_rV.add_(log_q_rV).exp_().mul_(1 - mix)
    torch.mul(log_q_rV.exp_(), w_rV.sum(-1, keepdim=True), out=s_rV).sub_(w_rV)
    return loss_r


def _skewed_reverse_kl_(t_rV: Tensor, s_rV: Tensor, p_rV: Tensor, mix: float) -> Tensor:
    """With m = α q + (1 − α) p and g = log q − log m − α q / m: G = q (g − Σ q g)"""
    log_p_rV, log_q_rV = _logs(t_rV, s_rV)
    above_rV = log_q_rV - losses.mixture(log_q_rV, log_p_rV, mix)
    q_rV = log_q_rV.exp_()
    loss_r = (q_rV * above_rV).sum(-1)
    g_rV = above_rV - mix * above_rV.exp()
    torch.mul(q_rV, g_rV - (q_rV * g_rV).sum(-1, keepdim=True), out=s_rV)
    return loss_r


KERNELS: Mapping[str, Kernel] = {
    "forward_kl": _forward_kl_,
    "reverse_kl": _reverse_kl_,
    "symmetric_kl": _symmetric_kl_,
    "jsd": _jsd_,
    "skewed_kl": _skewed_kl_,
    "skewed_reverse_kl": _skewed_reverse_kl_,
}
"""The same names as in `losses.DIVERGENCES`."""


def _logs(t_rV: Tensor, s_rV: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q."""
    return torch.log_softmax(t_rV, dim=-1), torch.log_softmax(s_rV, dim=-1)


def cross_entropy(z_rV: Tensor, label_r: Tensor) -> tuple[Tensor, Tensor]:
    """−log softmax(z)[label] of each row, and its gradient."""
    log_q_rV = torch.log_softmax(z_rV, dim=-1)
    picked_r1 = label_r[:, None]
    loss_r = -log_q_rV.gather(1, picked_r1)[:, 0]
    return loss_r, log_q_rV.exp_().scatter_add_(1, picked_r1, torch.full_like(log_q_rV[:, :1], -1.0))


@dataclasses.dataclass(frozen=True)
class TopK:
    """The teacher's K most likely ids, int64 [N, K], and their probabilities (see `losses.top_k_kl`)."""

    ids_NK: Tensor
    p_NK: Tensor

    def __len__(self) -> int:
        return len(self.ids_NK)

    def masked(self, mask_N: Tensor) -> TopK:
        return TopK(self.ids_NK[mask_N], self.p_NK[mask_N])


@dataclasses.dataclass(frozen=True)
class Samples:
    """Ids drawn from the teacher's distribution, int64 [N, K] (see `losses.sampled_kl`), and the entropy of that
    distribution, float [N], without which the loss is larger by it."""

    ids_NK: Tensor
    entropy_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_NK)

    def masked(self, mask_N: Tensor) -> Samples:
        return Samples(self.ids_NK[mask_N], None if self.entropy_N is None else self.entropy_N[mask_N])


def sparse_(targets: TopK | Samples, rows: Rows, s_rV: Tensor) -> Tensor:
    """Loss of each row, [r]; leaves its gradient to s in s.

    Samples: G = q − counts / K. TopK: q_i − p_i inside, q_j (1 − p_tail / q_tail) outside.
    """
    ids_rK = targets.ids_NK[rows]
    max_r, lse_r = s_rV.amax(-1), None
    picked_rK = s_rV.gather(1, ids_rK)
    if isinstance(targets, Samples):
        q_rV = torch.softmax(s_rV, dim=-1, out=s_rV)
        lse_r = max_r - q_rV.amax(-1).log()
        share = torch.full_like(picked_rK, -1 / ids_rK.shape[1])
        q_rV.scatter_add_(1, ids_rK, share)
        crossed_r = lse_r - picked_rK.mean(-1)
        return crossed_r if targets.entropy_N is None else crossed_r - targets.entropy_N[rows].float()
    p_rK = targets.p_NK[rows].float()
    tail_r = (1 - p_rK.sum(-1)).clamp_min_(0)
    # The sum over the others is taken without the K, not as 1 − Σ, which cancels where the K are all.
    s_rV.scatter_(1, ids_rK, float("-inf"))
    others_max_r = s_rV.amax(-1)
    q_rV = torch.softmax(s_rV, dim=-1, out=s_rV)  # of the others alone
    lse_others_r = others_max_r - q_rV.amax(-1).log()
    lse_r = torch.logaddexp(picked_rK.logsumexp(-1), lse_others_r)
    log_q_rK, log_q_tail_r = picked_rK - lse_r[:, None], lse_others_r - lse_r
    q_rV.mul_((log_q_tail_r.exp() - tail_r)[:, None])
    q_rV.scatter_(1, ids_rK, log_q_rK.exp() - p_rK)
    entropy_r = torch.special.xlogy(p_rK, p_rK).sum(-1) + torch.special.xlogy(tail_r, tail_r)
    return entropy_r - (p_rK * log_q_rK).sum(-1) - tail_r * log_q_tail_r
