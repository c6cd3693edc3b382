"""Bamba: layers of Mamba-2 or attention, each with an FFN. hidden and the Mamba heads are cut together, as the config
allows only expand × hidden."""

import dataclasses

from prunus.families._decoder import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    BAMBA_FIELDS,
    FFN,
    FIELDS,
    Weights,
    mamba,
    mamba_weights,
)
from prunus.families.family import Family

OUTER: Weights = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.final_layernorm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

FEED_FORWARD: Weights = {
    "feed_forward.gate_proj.weight": ("ffn", "hidden"),
    "feed_forward.up_proj.weight": ("ffn", "hidden"),
    "feed_forward.down_proj.weight": ("hidden", "ffn"),
    "input_layernorm.weight": ("hidden",),
    "pre_ff_layernorm.weight": ("hidden",),
}

OWN_FFN = dataclasses.replace(
    FFN,
    module="feed_forward",
    norm="pre_ff_layernorm",
    reads=("feed_forward.gate_proj", "feed_forward.up_proj"),
    write="feed_forward.down_proj",
    gate="feed_forward.gate_proj",
)

FAMILY = Family(
    model_type="bamba",
    layer_weights=ATTENTION_WEIGHTS | mamba_weights("mamba") | FEED_FORWARD,
    outer_weights=OUTER,
    branches=(ATTENTION, mamba("mamba", "input_layernorm"), OWN_FFN),
    final_norm="model.final_layernorm",
    gated_norms={"mamba.norm": "mamba_groups"},
    constraints=("even_head_dim", "mamba_is_expand"),
    fields=FIELDS | BAMBA_FIELDS | {"expand": "mamba_expand"},
    branch_layers={"attn_layer_indices": "attention"},
)
