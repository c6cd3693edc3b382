"""Jais 2. LayerNorm, biases, relu², no gate."""

import dataclasses

from prunus.families import nemotron

FAMILY = dataclasses.replace(
    nemotron.FAMILY,
    model_type="jais2",
    norm_offset=0.0,
    constraints=("even_head_dim", "heads_divide_hidden"),
    elsewhere={},
)
