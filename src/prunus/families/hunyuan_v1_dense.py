"""Hunyuan (dense). Norms on queries and keys, one vector of head_dim for all heads each."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS, Weights
from prunus.families.family import Family

QK_NORMS: Weights = {
    "self_attn.query_layernorm.weight": ("head_dim",),
    "self_attn.key_layernorm.weight": ("head_dim",),
}

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    layer_weights=PROJECTIONS | PRE_NORMS | QK_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
)
