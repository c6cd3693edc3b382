"""Phi-3, Phi-3.5, Phi-4-mini. Queries, keys and values come from one projection, gate and up from another."""

import dataclasses

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, Weights
from prunus.families.family import Family

FUSED: Weights = {
    "self_attn.qkv_proj.weight": ("heads*head_dim + 2*kv_heads*head_dim", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "heads*head_dim"),
    "mlp.gate_up_proj.weight": ("2*ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}

FAMILY = Family(
    model_type="phi3",
    layer_weights=FUSED | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(
        dataclasses.replace(ATTENTION, reads=("self_attn.qkv_proj",)),
        dataclasses.replace(FFN, reads=("mlp.gate_up_proj",), gate=None),
    ),
)

# Its config counts the factors of a long context by hidden / heads, whatever head_dim is.
LONG_CONTEXT = dataclasses.replace(
    FAMILY,
    constraints=("even_head_dim", "hidden_is_heads"),
    requires={"rope_parameters.rope_type": "longrope"},
)

VARIANTS = (LONG_CONTEXT, FAMILY)
