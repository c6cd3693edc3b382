"""Qwen3 (dense). The q and k norms are one vector of head_dim for all heads: never sliced."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS, QK_NORMS
from prunus.families.family import Family

FAMILY = Family(
    model_type="qwen3",
    layer_weights=PROJECTIONS | PRE_NORMS | QK_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    per_layer_fields=("layer_types",),
    layer_count_fields=("max_window_layers",),
)
