"""EXAONE 4. Norms behind the branches only, and on queries and keys of each head; one attention kind per layer."""

import dataclasses

from prunus.families import olmo2
from prunus.families._decoder import PROJECTIONS, QK_NORMS, Weights

NORMS: Weights = {
    "post_attention_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
}

FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    model_type="exaone4",
    layer_weights=PROJECTIONS | NORMS | QK_NORMS,
    norms=(),
    per_layer_fields=("layer_types",),
)
