"""MiniMax-M2. As Mixtral, with a correction per expert in the router; one norm spans all queries, another all keys."""

import dataclasses

from prunus.families import mixtral, olmoe

FAMILY = dataclasses.replace(
    mixtral.FAMILY,
    model_type="minimax_m2",
    layer_weights={
        **mixtral.FAMILY.layer_weights,
        **olmoe.NORMS,
        "mlp.e_score_correction_bias": ("experts",),
    },
    norms=olmoe.FAMILY.norms,
    per_layer_fields=("attn_type_list",),
    buffers=("mlp.e_score_correction_bias",),
    stored_as={
        **mixtral.FAMILY.stored_as,
        "mlp.e_score_correction_bias": ("block_sparse_moe.e_score_correction_bias",),
    },
)
