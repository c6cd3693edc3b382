"""Helium. Its attention projects from hidden to hidden, so heads and hidden are cut together."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="helium",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    constraints=("even_head_dim", "hidden_is_heads"),
)
