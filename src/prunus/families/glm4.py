"""GLM-4 (0414). Norms before and behind every branch; gate and up come from one projection; biases on q, k, v."""

import dataclasses

from prunus.families import glm
from prunus.families._decoder import ATTENTION, Weights

NORMS: Weights = {"post_self_attn_layernorm.weight": ("hidden",), "post_mlp_layernorm.weight": ("hidden",)}

FAMILY = dataclasses.replace(
    glm.FAMILY,
    model_type="glm4",
    layer_weights=dict(glm.FAMILY.layer_weights) | NORMS,
    branches=(
        dataclasses.replace(ATTENTION, post_norm="post_self_attn_layernorm"),
        dataclasses.replace(glm.FAMILY.branches[1], post_norm="post_mlp_layernorm"),
    ),
    elsewhere={},
)
