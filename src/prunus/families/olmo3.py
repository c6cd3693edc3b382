"""OLMo 3. OLMo 2 with one attention kind per layer in `layer_types`."""

import dataclasses

from prunus.families import olmo2

FAMILY = dataclasses.replace(olmo2.FAMILY, model_type="olmo3", per_layer_fields=("layer_types",))
