"""Command R7B and Command A. One LayerNorm without bias feeds both branches, which run side by side."""

import dataclasses

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PROJECTIONS, SQUARE, Weights
from prunus.families.family import Family

NORM: Weights = {"input_layernorm.weight": ("hidden",)}

FAMILY = Family(
    model_type="cohere2",
    layer_weights=PROJECTIONS | NORM,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, dataclasses.replace(FFN, norm="input_layernorm", beside=True)),
    centred=True,
    elsewhere={"llama.cpp": SQUARE},
    per_layer_fields=("layer_types",),
)
