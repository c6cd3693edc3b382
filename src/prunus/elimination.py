"""What each neuron is worth to its layer when neurons leave one after another and those that stay make up for them.

Shapes: F neurons, O channels that they write.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 48
"""Neurons leave in so many groups: after each, what the others can make up for is computed anew."""
DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean."""


@torch.no_grad()
def removal_errors(gram_FF: Tensor, weight_OF: Tensor, *, rounds: int = ROUNDS, damping: float = DAMPING) -> Tensor:
    """Rise of the squared error of what is written when a neuron leaves, after those that leave before it.

        e_i = ‖W_i‖² / (G⁻¹)_ii,   then   W ← W − W_i (G⁻¹)_i: / (G⁻¹)_ii,   G⁻¹ ← G⁻¹ − (G⁻¹)_:i (G⁻¹)_i: / (G⁻¹)_ii

    which is what least squares over the neurons that stay would give. Source: Optimal Brain Surgeon (Hassibi & Stork,
    1993) for whole columns of one linear map, in groups.

    Args:
        gram_FF: E[h hᵀ] of the neurons, float32.
        weight_OF: the projection that writes.
    Returns:
        float32 [F], ascending in the order in which they leave: a neuron has at least what those before it have.
    """
    size, device = len(gram_FF), gram_FF.device
    mean = gram_FF.diagonal().mean().clamp_min(1e-12)  # a layer may be dead
    damped = gram_FF.double() + damping * mean * torch.eye(size, dtype=torch.float64, device=device)
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()
    weight_OF, left_F = weight_OF.float().clone(), torch.ones(size, dtype=torch.bool, device=device)
    errors_F, least = torch.empty(size, device=device), torch.zeros((), device=device)
    for leaving in torch.arange(size).chunk(rounds):
        now_F = weight_OF.square().sum(0) / inverse_FF.diagonal().clamp_min(1e-20)
        gone = now_F.masked_fill(~left_F, torch.inf).topk(len(leaving), largest=False).indices
        errors_F[gone] = torch.maximum(now_F[gone], least)
        least = errors_F[gone].max()
        left_F[gone] = False
        made_up_GF = torch.linalg.solve(inverse_FF[gone][:, gone], inverse_FF[gone])
        weight_OF = weight_OF - weight_OF[:, gone] @ made_up_GF
        inverse_FF = inverse_FF - inverse_FF[:, gone] @ made_up_GF
    return errors_F
