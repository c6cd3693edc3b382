"""Divergences between teacher and student, naive and readable, in fp32: the reference that `fused` is tested against.

N tokens · V vocabulary · D hidden channels.
"""

from __future__ import annotations

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


def forward_kl(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    mask_N: Tensor | None = None,
) -> Tensor:
    """Forward KL divergence KL(teacher ‖ student).

        L = T²/num_tokens Σ_n Σ_v p log(p / q),   p = softmax(z_t / T),   q = softmax(z_s / T)

    Source: Hinton et al., arXiv:1503.02531: T² keeps the size of the gradient, T (q − p) / num_tokens, as T grows.
    Vocabularies padded to different sizes are cut to the ids they share; p and q are normalised over those.

    Args:
        student_logits_NV, teacher_logits_NV: any float dtype; computed in fp32.
        num_tokens: valid tokens of the whole step, over all micro-batches and ranks, so that the sum of the losses
            of the parts is the loss of the whole.
        temperature: T > 0.
        mask_N: bool [N], True for the tokens that count; None counts all.
    Returns:
        float32 scalar.
    Raises:
        ValueError: different numbers of tokens, num_tokens < 1 or temperature <= 0.
    """
    check_arguments(len(student_logits_NV), len(teacher_logits_NV), mask_N, num_tokens, temperature)
    shared = min(student_logits_NV.shape[1], teacher_logits_NV.shape[1])
    log_q_NV = F.log_softmax(student_logits_NV[:, :shared].float() / temperature, dim=-1)
    log_p_NV = F.log_softmax(teacher_logits_NV[:, :shared].float() / temperature, dim=-1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    return temperature**2 * _masked(kl_N, mask_N).sum() / num_tokens


def cross_entropy(logits_NV: Tensor, target_N: Tensor, *, num_tokens: int, mask_N: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the next token, summed over the valid tokens and divided by `num_tokens`.

    Args:
        logits_NV: any float dtype; computed in fp32.
        target_N: the id that follows each position (already shifted), int64. Masked positions may hold any id.
        num_tokens, mask_N: as in `forward_kl`; the mask is that of the targets.
    Returns:
        float32 scalar.
    Raises:
        ValueError: different numbers of tokens, or num_tokens < 1.
    """
    check_arguments(len(logits_NV), len(target_N), mask_N, num_tokens)
    return F.cross_entropy(_masked(logits_NV, mask_N).float(), _masked(target_N, mask_N), reduction="sum") / num_tokens


def check_arguments(
    student_tokens: int, other_tokens: int, mask_N: Tensor | None, num_tokens: int, temperature: float = 1.0
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


def _masked(values: Tensor, mask_N: Tensor | None) -> Tensor:
    return values if mask_N is None else values[mask_N]
