"""Qwen2 and Qwen2.5. Biases on q, k, v; one attention kind per layer in `layer_types`."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS, SQUARE
from prunus.families.family import Family

FAMILY = Family(
    model_type="qwen2",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    elsewhere={"llama.cpp": SQUARE, "vLLM": SQUARE},
    per_layer_fields=("layer_types",),
    layer_count_fields=("max_window_layers",),
)
