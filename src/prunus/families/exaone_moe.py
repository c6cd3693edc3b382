"""K-EXAONE. As dots.llm1, with windows in some layers and a list of which layers are dense."""

import dataclasses

from prunus.families import dots1

FAMILY = dataclasses.replace(
    dots1.FAMILY,
    model_type="exaone_moe",
    fields={**dots1.FAMILY.fields, "experts": "num_experts", "shared_experts": "num_shared_experts"},
    stored_as={
        **dots1.FAMILY.stored_as,
        "mlp.gate.e_score_correction_bias": ("mlp.e_score_correction_bias",),
    },
    per_layer_fields=("layer_types", "mlp_layer_types", "is_moe_layer"),
    further_layers="num_nextn_predict_layers",
)
