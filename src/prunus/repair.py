"""Closed-form repairs of a cut model: pure tensor functions. No new parameters, no change of format, no training.

Shapes: N tokens, H teacher channels, K kept channels, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.errors import BadData

DAMPING = 0.25
"""Ridge of the least squares, as a share of the mean diagonal of the Gram matrix. With less the student is nearer to
its teacher on text like that of the calibration, but further on other text, and after training on both: see LOG.md."""


def norm_scale(energy_H: Tensor, kept_K: Tensor) -> float:
    """Factor on an RMSNorm's weight that makes up for the channels that left its mean.

        s = √( (H/K) · (1 − ρ) ),   ρ = share of the energy that sat in the dropped channels

    An RMSNorm divides by the mean square over its channels. Without the dropped ones the mean is over K channels that
    hold (1 − ρ) of the energy, so every kept channel comes out too small or too large by the same factor.

    Args:
        energy_H: float [H], E[(x/rms(x))²] of each channel at the norm's input; its scale does not matter.
        kept_K: int64 [K], kept channels.
    Raises:
        ValueError: the energy is not finite, or the kept channels hold none.
    """
    total, kept = float(energy_H.sum()), float(energy_H[kept_K].sum())
    if not math.isfinite(total) or kept <= 0:
        raise ValueError(f"norm_scale: energy {total}, of which kept {kept}; measure on text that activates the model")
    return math.sqrt(len(energy_H) / len(kept_K) * kept / total)


class LeastSquares:
    """The projection that maps what the student sees to what it should produce.

        W = argmin Σ_n ‖ t_n − W x_n ‖² + λ ‖W − W₀‖²  =  (T ᵀX + λ W₀)(XᵀX + λ I)⁻¹,   λ = damping · mean diag(XᵀX)

    The ridge pulls to W₀, the sliced weights: where the calibration text says nothing, the teacher's weights stay.

    Args:
        gram_KK: float32 [K, K], XᵀX of the projection's input in the student; factored once, for all projections that
            read it.
    Raises:
        BadData: it is not positive definite.
    """

    def __init__(self, gram_KK: Tensor, *, damping: float = DAMPING) -> None:
        mean = gram_KK.diagonal().mean().double()
        self.ridge = damping * mean.clamp_min(1e-12)  # a layer may be dead: W₀ stays
        left = gram_KK.to(torch.float64, copy=True)
        left.diagonal().add_(self.ridge)
        self.factor, failed = torch.linalg.cholesky_ex(left)
        if failed:
            raise BadData(
                f"the repair's equations have no solution with a damping of {damping:g}: what the student sees of this "
                f"text says too little. Give more text (prune.tokens), or more damping ({DAMPING} by default)"
            )

    def __call__(self, cross_OK: Tensor, start_OK: Tensor) -> Tensor:
        """float32 [O, K].

        Args:
            cross_OK: float32 [O, K], TᵀX with the targets T.
            start_OK: [O, K], the sliced weights W₀.
        """
        right = cross_OK.double() + self.ridge * start_OK.double()
        return torch.cholesky_solve(right.T, self.factor).T.float()


def head_residuals(heads_LD: Tensor, ranked_L: Sequence[int], kept: int) -> Tensor:
    """Fold the heads that leave into the weakest that stay.

        head_i ← head_i + (head_i − head_{2K−i+1})   for the kept ranks i with a counterpart among the dropped

    Source: Minitron, arXiv:2407.14679, sec. 2.3. Under grouped-query attention: query heads only, within their group.

    Args:
        heads_LD: [L, D], the flattened query projection of each of the L heads of a group.
        ranked_L: head indices, most important first.
        kept: K, how many stay.
    Returns:
        [L, D]; rows of dropped heads unchanged.
    """
    total, result = len(ranked_L), heads_LD.clone()
    for rank in range(max(1, 2 * kept - total + 1), kept + 1):
        stays, leaves = ranked_L[rank - 1], ranked_L[2 * kept - rank]
        result[stays] = 2 * heads_LD[stays] - heads_LD[leaves]
    return result
