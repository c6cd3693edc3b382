"""What neurons and heads are worth to their layer when they leave one after another and the others make up for them.

Shapes: P parts (neurons, heads, groups of heads), D columns of a part, F = P · D columns, O channels that are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 48
"""Parts leave in so many turns: after each, what the others can make up for is computed anew."""
DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean."""


@torch.no_grad()
def removal_errors(
    gram_FF: Tensor, weight_OF: Tensor, *, columns: int = 1, rounds: int = ROUNDS, damping: float = DAMPING
) -> Tensor:
    """Rise of the squared error of what is written when a part leaves, after those that leave before it.

        e_p = tr W_p ((G⁻¹)_pp)⁻¹ W_pᵀ,   then   W ← W − W_p ((G⁻¹)_pp)⁻¹ (G⁻¹)_p:
                                          and    G⁻¹ ← G⁻¹ − (G⁻¹)_:p ((G⁻¹)_pp)⁻¹ (G⁻¹)_p:

    which is what least squares over the parts that stay would give. Source: Optimal Brain Surgeon (Hassibi & Stork,
    1993) for whole columns of one linear map, in groups.

    Args:
        gram_FF: E[h hᵀ] of what is read, float32.
        weight_OF: the projection that writes.
        columns: D, of a part; they lie side by side.
    Returns:
        float32 [P], ascending in the order in which they leave: a part has at least what those before it have.
    """
    size, device, parts = len(gram_FF), gram_FF.device, len(gram_FF) // columns
    mean = gram_FF.diagonal().mean().clamp_min(1e-12)  # a layer may be dead
    damped = gram_FF.double() + damping * mean * torch.eye(size, dtype=torch.float64, device=device)
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()
    places_PD, left = torch.arange(size, device=device).view(parts, columns), torch.arange(parts, device=device)
    weight_OF, errors_P, least = weight_OF.float().clone(), torch.empty(parts, device=device), 0.0
    for leaving in torch.arange(parts).chunk(rounds):
        now_K = _errors(inverse_FF, weight_OF, places_PD[left])
        chosen = now_K.topk(len(leaving), largest=False).indices
        errors_P[left[chosen]] = now_K[chosen].clamp_min(least)
        least = float(errors_P[left[chosen]].max())
        gone = places_PD[left[chosen]].flatten()
        left = left[torch.ones(len(left), dtype=torch.bool, device=device).index_fill_(0, chosen, False)]
        made_up_GF = torch.linalg.solve(inverse_FF[gone][:, gone], inverse_FF[gone])
        weight_OF.addmm_(weight_OF[:, gone], made_up_GF, alpha=-1)
        inverse_FF.addmm_(inverse_FF[:, gone], made_up_GF, alpha=-1)
    return errors_P


def _errors(inverse_FF: Tensor, weight_OF: Tensor, places_KD: Tensor) -> Tensor:
    """e of each of K parts."""
    weight_KDO = weight_OF.T[places_KD]
    # Not `solve`: on two threads it takes seventeen times as long for thousands of small systems.
    inverted_KDD = torch.linalg.inv(inverse_FF[places_KD[:, :, None], places_KD[:, None]])
    return (inverted_KDD @ weight_KDO * weight_KDO).sum((1, 2))
