"""Gemma 3, text only. Norms multiply by (1 + weight), sandwich every branch, and the embedding is scaled by √hidden.

`query_pre_attn_scalar` is a constant of the attention and stays as it is.
"""

import dataclasses

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS, QK_NORMS, Weights
from prunus.families.family import Family

SANDWICH_NORMS: Weights = {
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
}

FAMILY = Family(
    model_type="gemma3_text",
    layer_weights=PROJECTIONS | PRE_NORMS | SANDWICH_NORMS | QK_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(
        dataclasses.replace(ATTENTION, post_norm="post_attention_layernorm"),
        dataclasses.replace(FFN, norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
    ),
    norm_offset=1.0,
    scaled_embedding=True,
    constraints=("even_head_dim", "heads_divide_hidden"),
    per_layer_fields=("layer_types",),
    requires={"use_bidirectional_attention": False},
)
