"""Nemotron and Minitron. LayerNorm that multiplies by (1 + weight), relu², no gate; rotary on a part of each head."""

import dataclasses

from prunus.families import arcee
from prunus.families._decoder import OUTER_WEIGHTS, SQUARE

FAMILY = dataclasses.replace(
    arcee.FAMILY,
    model_type="nemotron",
    outer_weights=OUTER_WEIGHTS | {"model.norm.bias": ("hidden",)},
    norm_offset=1.0,
    centred=True,
    constraints=("even_head_dim",),
    elsewhere={"llama.cpp": SQUARE},
)
