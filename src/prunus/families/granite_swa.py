"""Granite with sliding windows. A sink for each query head takes its share of the attention."""

import dataclasses

from prunus.families import granite
from prunus.families._decoder import Weights

SINKS: Weights = {"self_attn.sinks": ("heads",)}

FAMILY = dataclasses.replace(
    granite.FAMILY,
    model_type="granite_swa",
    layer_weights={**granite.FAMILY.layer_weights, **SINKS},
    per_layer_fields=("layer_types", "layer_rope_theta"),
)
