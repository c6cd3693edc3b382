"""GPT-NeoX and Pythia. Query, key and value of each head lie together; both branches run side by side (or one after the
other, if the config says so), each behind its own LayerNorm; hidden and heads are cut together, as attention has no
head_dim of its own."""

import dataclasses

from prunus.families._decoder import Weights
from prunus.families.family import Branch, Family

LAYER: Weights = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "attention.query_key_value.weight": ("heads*3*head_dim", "hidden"),
    "attention.dense.weight": ("hidden", "heads*head_dim"),
    "mlp.dense_h_to_4h.weight": ("ffn", "hidden"),
    "mlp.dense_4h_to_h.weight": ("hidden", "ffn"),
}

OUTER: Weights = {
    "gpt_neox.embed_in.weight": ("vocab", "hidden"),
    "gpt_neox.final_layer_norm.weight": ("hidden",),
    "gpt_neox.final_layer_norm.bias": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

FAMILY = Family(
    model_type="gpt_neox",
    layer_weights=LAYER,
    outer_weights=OUTER,
    layer_prefix="gpt_neox.layers.",
    branches=(
        Branch(
            name="attention",
            module="attention",
            norm="input_layernorm",
            reads=("attention.query_key_value",),
            write="attention.dense",
            inner="heads",
        ),
        Branch(
            name="ffn",
            module="mlp",
            norm="post_attention_layernorm",
            reads=("mlp.dense_h_to_4h",),
            write="mlp.dense_4h_to_h",
            inner="ffn",
            gate="mlp.dense_h_to_4h",
            beside=True,
        ),
    ),
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    centred=True,
    constraints=("multi_head", "hidden_is_heads", "heads_divide_hidden"),
    unread=("attention.bias", "attention.masked_bias", "*rotary_emb.inv_freq"),
    requires={"use_parallel_residual": True},
    stored_as={"lm_head.weight": ("embed_out.weight",)},
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_attention_heads",
        "head_dim": "head_dim",
        "vocab": "vocab_size",
    },
)

ATTENTION, FFN = FAMILY.branches
VARIANTS = (
    FAMILY,
    dataclasses.replace(
        FAMILY,
        branches=(ATTENTION, dataclasses.replace(FFN, beside=False)),
        requires={"use_parallel_residual": False},
    ),
)
