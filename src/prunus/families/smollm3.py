"""SmolLM3. Some layers without rotary embedding: `no_rope_layers` has an entry for each, as `layer_types` has."""

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS
from prunus.families.family import Family

FAMILY = Family(
    model_type="smollm3",
    layer_weights=PROJECTIONS | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN),
    per_layer_fields=("layer_types", "no_rope_layers"),
)
