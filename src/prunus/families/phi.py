"""Phi-1 to Phi-2. One LayerNorm feeds both branches, which run side by side; biases everywhere, also on the head."""

import dataclasses

from prunus.families._decoder import ATTENTION, FFN, PROJECTIONS, SQUARE, Weights
from prunus.families.family import Family

OUTER: Weights = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.final_layernorm.weight": ("hidden",),
    "model.final_layernorm.bias": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
    "lm_head.bias": ("vocab",),
}

OWN: Weights = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.dense.weight": PROJECTIONS["self_attn.o_proj.weight"],
    "mlp.fc1.weight": ("ffn", "hidden"),
    "mlp.fc2.weight": ("hidden", "ffn"),
}

FAMILY = Family(
    model_type="phi",
    layer_weights={name: dims for name, dims in PROJECTIONS.items() if "o_proj" not in name and "mlp" not in name}
    | OWN,
    outer_weights=OUTER,
    branches=(
        dataclasses.replace(ATTENTION, write="self_attn.dense"),
        dataclasses.replace(
            FFN, norm="input_layernorm", reads=("mlp.fc1",), write="mlp.fc2", gate="mlp.fc1", beside=True
        ),
    ),
    final_norm="model.final_layernorm",
    centred=True,
    elsewhere={"llama.cpp": SQUARE},
)
