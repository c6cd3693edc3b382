"""Command R. One LayerNorm without bias feeds both branches, which run side by side."""

import dataclasses

from prunus.families import cohere2

FAMILY = dataclasses.replace(cohere2.FAMILY, model_type="cohere", per_layer_fields=())
