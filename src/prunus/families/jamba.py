"""Jamba: layers of Mamba or attention (without positions), each with an FFN or with experts of the same size. Which it
is follows from the layer's number, so depth is cut by whole periods. Mamba's inner channels leave with those of the
stream, because its config has a factor alone."""

import dataclasses

from prunus.families._decoder import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    EXPERTS,
    FIELDS,
    MAMBA1_DERIVED,
    SQUARE,
    Weights,
    expert_fields,
    mamba,
    mamba1_weights,
)
from prunus.families.bamba import FEED_FORWARD, OUTER, OWN_FFN
from prunus.families.family import Family

NORMS: Weights = {
    "mamba.dt_layernorm.weight": ("dt_rank",),
    "mamba.b_layernorm.weight": ("state",),
    "mamba.c_layernorm.weight": ("state",),
}

OWN_EXPERTS: Weights = {
    "feed_forward.router.weight": ("experts", "hidden"),
    "feed_forward.experts.gate_up_proj": ("experts", "2*expert_ffn", "hidden"),
    "feed_forward.experts.down_proj": ("experts", "hidden", "expert_ffn"),
}

MAMBA_FIELDS = {
    "state": "mamba_d_state",
    "convolution": "mamba_d_conv",
    "dt_rank": "mamba_dt_rank",
    "expand": "mamba_expand",
}

DERIVED = {**MAMBA1_DERIVED, "mamba_heads": "expand*hidden"}

DENSE = Family(
    model_type="jamba",
    layer_weights=ATTENTION_WEIGHTS | mamba1_weights("mamba") | NORMS | FEED_FORWARD,
    outer_weights=OUTER,
    branches=(ATTENTION, mamba("mamba", "input_layernorm"), OWN_FFN),
    final_norm="model.final_layernorm",
    norms=("mamba.b_layernorm", "mamba.c_layernorm"),
    constraints=(),
    elsewhere={"llama.cpp": SQUARE, "vLLM": SQUARE},
    requires={"num_experts": 1},
    fields=FIELDS | MAMBA_FIELDS,
    derived=DERIVED,
    layer_periods=("attn_layer_period", "expert_layer_period"),
)

WITH_EXPERTS = dataclasses.replace(
    DENSE,
    layer_weights={**DENSE.layer_weights, **OWN_EXPERTS},
    branches=(
        *DENSE.branches,
        dataclasses.replace(
            EXPERTS,
            module="feed_forward",
            norm="pre_ff_layernorm",
            reads=("feed_forward.router",),
            experts="feed_forward.experts",
        ),
    ),
    constraints=("aligned_experts", "several_experts"),
    requires={},
    fields=expert_fields("num_experts", "intermediate_size") | MAMBA_FIELDS,
    derived={**DERIVED, "ffn": "1*expert_ffn"},
    stored_as={
        "feed_forward.experts.gate_up_proj": (
            "feed_forward.experts.*.gate_proj.weight",
            "feed_forward.experts.*.up_proj.weight",
        ),
        "feed_forward.experts.down_proj": ("feed_forward.experts.*.down_proj.weight",),
    },
)

VARIANTS = (DENSE, WITH_EXPERTS)
