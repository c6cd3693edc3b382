"""Command R. One LayerNorm without bias feeds both branches, which run side by side. In Command R+ each head norms its
queries and keys by weights of its own."""

import dataclasses

from prunus.families import cohere2
from prunus.families._decoder import Weights

QK_NORMS: Weights = {
    "self_attn.q_norm.weight": ("heads", "head_dim"),
    "self_attn.k_norm.weight": ("kv_heads", "head_dim"),
}

FAMILY = dataclasses.replace(
    cohere2.FAMILY,
    model_type="cohere",
    per_layer_fields=(),
    requires={**cohere2.FAMILY.requires, "use_qk_norm": False},
)
VARIANTS = (
    FAMILY,
    dataclasses.replace(
        FAMILY,
        layer_weights={**FAMILY.layer_weights, **QK_NORMS},
        requires={**FAMILY.requires, "use_qk_norm": True},
    ),
)
