"""Divergences between teacher and student, naive and readable, in fp32: the reference that `fused` is tested against.

N tokens · V vocabulary · D hidden channels · K kept ids or samples of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def head_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Logits of an output head, in fp32 whatever the inputs are.

        u = scale · (h Wᵀ + b),   z = softcap · tanh(u / softcap)

    Args:
        hidden_ND: final hidden states, after the last norm.
        weight_VD: rows of the head.
        bias: [V], as of an lm_head with bias.
        softcap: final_logit_softcapping of Gemma 2; None leaves u as it is.
        scale: factor on the logits, as logit_scale of Cohere or 1 / logits_scaling of Granite.
    Returns:
        float32 [N, V].
    """
    logits_NV = hidden_ND.float() @ weight_VD.float().T
    if bias is not None:
        logits_NV = logits_NV + bias.float()
    logits_NV = scale * logits_NV
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def divergence(
    kind: str,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    mix: float = 0.5,
    mask_N: Tensor | None = None,
) -> Tensor:
    """One of `DIVERGENCES` between p = softmax(z_t / T) and q = softmax(z_s / T), · T² / num_tokens.

    T² keeps the size of the gradient as T grows (Hinton et al., arXiv:1503.02531). Vocabularies padded to different
    sizes are cut to the ids they share; p and q are normalised over those.

    Args:
        kind: key of `DIVERGENCES`.
        student_logits_NV, teacher_logits_NV: any float dtype; computed in fp32.
        num_tokens: valid tokens of the whole step, over all micro-batches and ranks, so that the sum of the losses
            of the parts is the loss of the whole.
        temperature: T > 0.
        mix: β of "jsd", α of the skewed ones, in (0, 1); the others do not read it.
        mask_N: bool [N], True for the tokens that count; None counts all.
    Returns:
        float32 scalar.
    Raises:
        ValueError: different numbers of tokens, num_tokens < 1, temperature <= 0 or mix outside (0, 1).
    """
    check_arguments(len(student_logits_NV), len(teacher_logits_NV), mask_N, num_tokens, temperature, mix)
    shared = min(student_logits_NV.shape[1], teacher_logits_NV.shape[1])
    log_q_NV = F.log_softmax(student_logits_NV[:, :shared].float() / temperature, dim=-1)
    log_p_NV = F.log_softmax(teacher_logits_NV[:, :shared].float() / temperature, dim=-1)
    loss_N = DIVERGENCES[kind](log_p_NV, log_q_NV, mix)
    return temperature**2 * _masked(loss_N, mask_N).sum() / num_tokens


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor, mix: float = 0.5) -> Tensor:
    """KL(p ‖ q) of each token, [N]: the student must cover all that the teacher may say. Minitron's choice."""
    return _kl(log_p_NV, log_q_NV)


def reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor, mix: float = 0.5) -> Tensor:
    """KL(q ‖ p): the student may leave out what it cannot match. MiniLLM, arXiv:2306.08543."""
    return _kl(log_q_NV, log_p_NV)


def symmetric_kl(log_p_NV: Tensor, log_q_NV: Tensor, mix: float = 0.5) -> Tensor:
    """½ KL(p ‖ q) + ½ KL(q ‖ p)."""
    return 0.5 * (_kl(log_p_NV, log_q_NV) + _kl(log_q_NV, log_p_NV))


def jsd(log_p_NV: Tensor, log_q_NV: Tensor, mix: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q. GKD, arXiv:2306.13649."""
    log_m_NV = mixture(log_p_NV, log_q_NV, mix)
    return mix * _kl(log_p_NV, log_m_NV) + (1 - mix) * _kl(log_q_NV, log_m_NV)


def skewed_kl(log_p_NV: Tensor, log_q_NV: Tensor, mix: float = 0.1) -> Tensor:
    """KL(p ‖ α p + (1 − α) q): bounded where q vanishes. DistiLLM, arXiv:2402.03898, with α = 0.1."""
    return _kl(log_p_NV, mixture(log_p_NV, log_q_NV, mix))


def skewed_reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor, mix: float = 0.1) -> Tensor:
    """KL(q ‖ α q + (1 − α) p): bounded where p vanishes. DistiLLM, arXiv:2402.03898, with α = 0.1."""
    return _kl(log_q_NV, mixture(log_q_NV, log_p_NV, mix))


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    function.__name__: function
    for function in (forward_kl, reverse_kl, symmetric_kl, jsd, skewed_kl, skewed_reverse_kl)
}


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share · a + (1 − share) · b), from the larger of the two, so that it is exact where they are equal."""
    above = log_a - log_b
    other = torch.where(above > 0, 1 - share, share)
    return torch.maximum(log_a, log_b) + torch.log1p(other * torch.expm1(-above.abs()))


def cross_entropy(logits_NV: Tensor, target_N: Tensor, *, num_tokens: int, mask_N: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the next token, summed over the valid tokens and divided by `num_tokens`.

    Args:
        logits_NV: any float dtype; computed in fp32.
        target_N: the id that follows each position (already shifted), int64. Masked positions may hold any id.
        num_tokens, mask_N: as in `divergence`; the mask is that of the targets.
    Returns:
        float32 scalar.
    Raises:
        ValueError: different numbers of tokens, or num_tokens < 1.
    """
    check_arguments(len(logits_NV), len(target_N), mask_N, num_tokens)
    return F.cross_entropy(_masked(logits_NV, mask_N).float(), _masked(target_N, mask_N), reduction="sum") / num_tokens


def top_k_kl(
    logits_NV: Tensor,
    ids_NK: Tensor,
    p_NK: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    mask_N: Tensor | None = None,
) -> Tensor:
    """KL(p ‖ q) over K ids and one bucket that holds all others: exact for these K + 1 categories.

    Renormalising the K probabilities instead would teach the student that nothing else can follow.

    Args:
        ids_NK: the teacher's most likely ids, int64, distinct in each row.
        p_NK: their probabilities at this temperature; what they lack to 1 is the bucket's.
    """
    check_arguments(len(logits_NV), len(ids_NK), mask_N, num_tokens, temperature)
    log_q_NV = F.log_softmax(logits_NV.float() / temperature, dim=-1)
    others_NV = torch.ones_like(log_q_NV, dtype=torch.bool).scatter(1, ids_NK, False)
    tail_N = (1 - p_NK.float().sum(-1)).clamp_min(0)
    log_q_tail_N = log_q_NV.masked_fill(~others_NV, float("-inf")).logsumexp(-1)
    parts_NK = torch.special.xlogy(p_NK.float(), p_NK.float()) - p_NK.float() * log_q_NV.gather(1, ids_NK)
    loss_N = parts_NK.sum(-1) + torch.special.xlogy(tail_N, tail_N) - tail_N * log_q_tail_N
    return temperature**2 * _masked(loss_N, mask_N).sum() / num_tokens


def sampled_kl(
    logits_NV: Tensor,
    ids_NK: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    mask_N: Tensor | None = None,
) -> Tensor:
    """−1/K Σ_k log q(id_k) over K ids drawn from the teacher's p: in expectation forward KL plus the entropy of p.

    Its gradient q − (counts / K) is that of forward KL in expectation, and needs no more of the teacher than K ids a
    token. Random sampling KD, arXiv:2503.16870, with the teacher itself as the proposal, so that all weights are 1.

    Args:
        ids_NK: samples of softmax(z_t / T) with replacement, int64.
    """
    check_arguments(len(logits_NV), len(ids_NK), mask_N, num_tokens, temperature)
    log_q_NV = F.log_softmax(logits_NV.float() / temperature, dim=-1)
    return temperature**2 * -_masked(log_q_NV.gather(1, ids_NK).mean(-1), mask_N).sum() / num_tokens


def hidden_cosine(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """1 − cos of each token's states, float32 [N]. Blind to their size."""
    return 1 - F.cosine_similarity(student_NH.float(), teacher_NH.float(), dim=-1)


def hidden_mse(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² of each token's states, float32 [N]: a token with massive activations counts like any other."""
    difference_N = (student_NH.float() - teacher_NH.float()).square().sum(-1)
    return difference_N / teacher_NH.float().square().sum(-1).clamp_min(1e-12)


HIDDEN_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": hidden_cosine, "mse": hidden_mse}


def check_arguments(
    student_tokens: int,
    other_tokens: int,
    mask_N: Tensor | None,
    num_tokens: int,
    temperature: float = 1.0,
    mix: float = 0.5,
) -> None:
    """What every loss over tokens demands of its arguments.

    Raises:
        ValueError: names the first demand that is not met.
    """
    if student_tokens != other_tokens:
        raise ValueError(f"{student_tokens} student tokens against {other_tokens}; both must be the same tokens")
    if mask_N is not None and (mask_N.dtype != torch.bool or mask_N.shape != (student_tokens,)):
        raise ValueError(f"mask must be bool [{student_tokens}], not {mask_N.dtype} {list(mask_N.shape)}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; pass the number of valid tokens of the whole step, at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if not 0 < mix < 1:
        raise ValueError(f"mix is {mix}; it must lie between 0 and 1")


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def _masked(values: Tensor, mask_N: Tensor | None) -> Tensor:
    return values if mask_N is None else values[mask_N]
