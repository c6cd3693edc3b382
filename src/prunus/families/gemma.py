"""Gemma 1. Norms multiply by (1 + weight), and the embedding is scaled by √hidden."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="gemma",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    norm_offset=1.0,
    scaled_embedding=True,
    requires={"use_bidirectional_attention": False},
)
