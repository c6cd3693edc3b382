"""ERNIE 4.5's mixtures of experts. The first layers are dense; the router has a correction per expert, and shared
experts see every token."""

import dataclasses

from prunus.families import dots1
from prunus.families._decoder import ATTENTION_WEIGHTS, expert_fields

OTHERS = {name: dims for name, dims in dots1.OTHERS.items() if name not in dots1.FAMILY.buffers}
CORRECTION = "mlp.gate.moe_statics.e_score_correction_bias"

FAMILY = dataclasses.replace(
    dots1.FAMILY,
    model_type="ernie4_5_moe",
    layer_weights={**ATTENTION_WEIGHTS, **OTHERS, CORRECTION: ("1", "experts")},
    stored_as={**dots1.FAMILY.stored_as, CORRECTION: ("mlp.moe_statics.e_score_correction_bias",)},
    buffers=(),
    constraints=("even_head_dim", "aligned_experts"),
    requires={"moe_layer_interval": 1},
    fields=expert_fields("moe_num_experts", "moe_intermediate_size", "moe_k", shared_experts="moe_num_shared_experts"),
    per_layer_fields=(),
    layer_count_fields=("moe_layer_start_index",),
    fixed={"moe_layer_end_index": -1},
    further_layers="num_nextn_predict_layers",
    unread=(*dots1.FAMILY.unread, "model.mtp_*"),
)
