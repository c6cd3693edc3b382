"""Seed-OSS. Biases on q, k, v."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="seed_oss",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
)
