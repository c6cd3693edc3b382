"""Ministral. One attention kind per layer in `layer_types`."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="ministral",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    per_layer_fields=("layer_types",),
)
