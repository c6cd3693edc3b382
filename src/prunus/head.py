"""An output head, and the teacher's distribution that comes from one.

N tokens · V vocabulary · D hidden channels of the student, E of the teacher.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunus import hardware
from prunus.kernels import Samples, TopK

FACTORS, DIVISOR = ("logit_scale", "lm_head_multiplier"), "logits_scaling"
"""Config keys of what the logits are multiplied by (Cohere, Falcon-H1) and divided by (Granite)."""
MULTIPLIED = ("hyperclovax",)
"""Types that multiply by what the others divide by."""


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
    config = model.config  # not that of a decoder inside, whose factors transformers leaves out there
    softcap = getattr(config, "final_logit_softcapping", None)
    factors = (getattr(config, key, None) for key in FACTORS)
    scale = math.prod(factor for factor in factors if factor is not None)
    divisor = getattr(config, DIVISOR, None) or 1.0
    scale = scale * divisor if config.model_type in MULTIPLIED else scale / divisor
    return Head(module.weight, getattr(module, "bias", None), softcap, scale)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A whole distribution, as a teacher's: the states after the last norm, [N, E], and the head."""

    hidden_NE: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_NE)

    def masked(self, mask_N: Tensor) -> Dense:
        return dataclasses.replace(self, hidden_NE=self.hidden_NE[mask_N])


Targets = Dense | TopK | Samples
"""What a student is trained on: all that a loss needs of the teacher."""
