"""Llama 1–3, SmolLM2, TinyLlama. Heads must divide hidden, even where head_dim is explicit."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="llama",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    constraints=("even_head_dim", "heads_divide_hidden"),
)
