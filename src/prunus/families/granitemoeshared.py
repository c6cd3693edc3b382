"""Granite 3's mixtures with an FFN that sees every token beside the experts."""

import dataclasses

from prunus.families import granitemoe, granitemoehybrid
from prunus.families._decoder import ATTENTION

FAMILY = dataclasses.replace(
    granitemoe.FAMILY,
    model_type="granitemoeshared",
    layer_weights={**granitemoe.FAMILY.layer_weights, **granitemoehybrid.SHARED},
    branches=(
        ATTENTION,
        granitemoehybrid.EXPERTS,
        dataclasses.replace(granitemoehybrid.SHARED_FFN, beside=True),
    ),
    fields={**granitemoe.FAMILY.fields, "ffn": "shared_intermediate_size"},
)
