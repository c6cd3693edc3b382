"""Falcon, with rotary embeddings. Queries of each group lie before its key and value. 40B and 180B have a norm for each
branch, 7B one norm for both, and one key and value for all heads, 11B one norm and groups; hidden and heads are cut
together, as attention has no head_dim of its own."""

import dataclasses

from prunus.families._decoder import Weights
from prunus.families.family import Branch, Family

OUTER: Weights = {
    "transformer.word_embeddings.weight": ("vocab", "hidden"),
    "transformer.ln_f.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

PROJECTIONS: Weights = {
    "self_attention.query_key_value.weight": ("kv_heads*(group + 2)*head_dim", "hidden"),
    "self_attention.dense.weight": ("hidden", "heads*head_dim"),
    "mlp.dense_h_to_4h.weight": ("ffn", "hidden"),
    "mlp.dense_4h_to_h.weight": ("hidden", "ffn"),
}

GROUPED = Family(
    model_type="falcon",
    layer_weights=PROJECTIONS | {"ln_attn.weight": ("hidden",), "ln_mlp.weight": ("hidden",)},
    outer_weights=OUTER,
    layer_prefix="transformer.h.",
    branches=(
        Branch(
            name="attention",
            module="self_attention",
            norm="ln_attn",
            reads=("self_attention.query_key_value",),
            write="self_attention.dense",
            inner="heads",
        ),
        Branch(
            name="ffn",
            module="mlp",
            norm="ln_mlp",
            reads=("mlp.dense_h_to_4h",),
            write="mlp.dense_4h_to_h",
            inner="ffn",
            gate="mlp.dense_h_to_4h",
            beside=True,
        ),
    ),
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    centred=True,
    ignores_positions=True,
    constraints=("hidden_is_heads", "heads_divide_hidden", "even_head_dim"),
    requires={"new_decoder_architecture": True, "alibi": False},
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffn": "ffn_hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_kv_heads",
        "vocab": "vocab_size",
    },
)

MULTI_QUERY = dataclasses.replace(
    GROUPED,
    layer_weights=PROJECTIONS
    | {
        "self_attention.query_key_value.weight": ("heads*head_dim + 2*head_dim", "hidden"),
        "input_layernorm.weight": ("hidden",),
    },
    branches=tuple(dataclasses.replace(branch, norm="input_layernorm") for branch in GROUPED.branches),
    requires={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
    fields={size: key for size, key in GROUPED.fields.items() if size != "kv_heads"},
    defaults={"kv_heads": "1"},
)

ONE_NORM = dataclasses.replace(
    GROUPED,
    layer_weights=PROJECTIONS | {"input_layernorm.weight": ("hidden",)},
    branches=MULTI_QUERY.branches,
    requires={**GROUPED.requires, "num_ln_in_parallel_attn": 1},
)

VARIANTS = (ONE_NORM, GROUPED, MULTI_QUERY)
