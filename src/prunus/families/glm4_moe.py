"""GLM-4.5 and 4.6. As dots.llm1; norms of queries and keys are an option, and layers that predict further tokens are
stored beside the others."""

import dataclasses

from prunus.families import dots1

FAMILY = dataclasses.replace(
    dots1.FAMILY,
    model_type="glm4_moe",
    per_layer_fields=(),
    further_layers="num_nextn_predict_layers",
)
