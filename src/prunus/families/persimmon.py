"""Persimmon. Query, key and value of each head lie together, and are normed per head; LayerNorm, relu², no gate; hidden
and heads are cut together, as attention has no head_dim of its own."""

import dataclasses

from prunus.families import gpt_neox
from prunus.families._decoder import Weights

LAYER: Weights = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "self_attn.query_key_value.weight": ("heads*3*head_dim", "hidden"),
    "self_attn.dense.weight": ("hidden", "heads*head_dim"),
    "mlp.dense_h_to_4h.weight": ("ffn", "hidden"),
    "mlp.dense_4h_to_h.weight": ("hidden", "ffn"),
    "self_attn.q_layernorm.weight": ("head_dim",),
    "self_attn.k_layernorm.weight": ("head_dim",),
}

OUTER: Weights = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.final_layernorm.weight": ("hidden",),
    "model.final_layernorm.bias": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

ATTENTION, FFN = gpt_neox.FAMILY.branches

FAMILY = dataclasses.replace(
    gpt_neox.FAMILY,
    model_type="persimmon",
    layer_weights=LAYER,
    outer_weights=OUTER,
    layer_prefix="model.layers.",
    branches=(
        dataclasses.replace(
            ATTENTION, module="self_attn", reads=("self_attn.query_key_value",), write="self_attn.dense"
        ),
        dataclasses.replace(FFN, beside=False),
    ),
    embedding="model.embed_tokens",
    final_norm="model.final_layernorm",
    requires={},
    stored_as={},
)
