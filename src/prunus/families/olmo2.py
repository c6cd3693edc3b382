"""OLMo 2. The stream is read as it is, and normed behind each branch; one norm spans all queries, another all keys."""

import dataclasses

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PROJECTIONS, SQUARE, Weights
from prunus.families.family import Family

NORMS: Weights = {
    "post_attention_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
    "self_attn.q_norm.weight": ("heads*head_dim",),
    "self_attn.k_norm.weight": ("kv_heads*head_dim",),
}

FAMILY = Family(
    model_type="olmo2",
    layer_weights=PROJECTIONS | NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(
        dataclasses.replace(ATTENTION, norm=None, post_norm="post_attention_layernorm"),
        dataclasses.replace(FFN, norm=None, post_norm="post_feedforward_layernorm"),
    ),
    norms=("self_attn.q_norm", "self_attn.k_norm"),
    elsewhere={"llama.cpp": SQUARE},
)
