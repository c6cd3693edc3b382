"""Ministral 3. Query temperature by position; nothing of it depends on a size."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="ministral3",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
)
