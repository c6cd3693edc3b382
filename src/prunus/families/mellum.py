"""Mellum 2: Qwen3's mixture with windows, and a list of which layers are dense."""

import dataclasses

from prunus.families import qwen3_moe

FAMILY = dataclasses.replace(
    qwen3_moe.FAMILY,
    model_type="mellum",
    branch_layers={},
    fixed={},
    per_layer_fields=("layer_types", "mlp_layer_types"),
    further_layers="num_nextn_predict_layers",
)
