"""VaultGemma. Gemma 2 without the norms behind the branches."""

import dataclasses

from prunus.families import gemma2
from prunus.families._decoder import ATTENTION, FFN, PROJECTIONS, Weights

NORMS: Weights = {
    "input_layernorm.weight": ("hidden",),
    "pre_feedforward_layernorm.weight": ("hidden",),
}

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="vaultgemma",
    layer_weights=PROJECTIONS | NORMS,
    branches=(ATTENTION, dataclasses.replace(FFN, norm="pre_feedforward_layernorm")),
)
