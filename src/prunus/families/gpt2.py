"""GPT-2. Projections are Conv1D, [inputs, outputs]; learned positions; hidden and heads are cut together, as attention
has no head_dim of its own."""

import dataclasses

from prunus.families._decoder import Weights
from prunus.families.family import Branch, Family

LAYER: Weights = {
    "ln_1.weight": ("hidden",),
    "attn.c_attn.weight": ("hidden", "3*heads*head_dim"),
    "attn.c_attn.bias": ("3*heads*head_dim",),
    "attn.c_proj.weight": ("heads*head_dim", "hidden"),
    "attn.c_proj.bias": ("hidden",),
    "ln_2.weight": ("hidden",),
    "mlp.c_fc.weight": ("hidden", "ffn"),
    "mlp.c_fc.bias": ("ffn",),
    "mlp.c_proj.weight": ("ffn", "hidden"),
    "mlp.c_proj.bias": ("hidden",),
}

OUTER: Weights = {
    "transformer.wte.weight": ("vocab", "hidden"),
    "transformer.wpe.weight": ("positions", "hidden"),
    "transformer.ln_f.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

FAMILY = Family(
    model_type="gpt2",
    layer_weights=LAYER,
    outer_weights=OUTER,
    layer_prefix="transformer.h.",
    branches=(
        Branch(
            name="attention",
            module="attn",
            norm="ln_1",
            reads=("attn.c_attn",),
            write="attn.c_proj",
            inner="heads",
        ),
        Branch(
            name="ffn",
            module="mlp",
            norm="ln_2",
            reads=("mlp.c_fc",),
            write="mlp.c_proj",
            inner="ffn",
            gate="mlp.c_fc",
        ),
    ),
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    transposed=True,
    centred=True,
    constraints=("multi_head", "hidden_is_heads", "heads_divide_hidden"),
    requires={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    unread=("attn.bias", "attn.masked_bias"),
    fields={
        "layers": "n_layer",
        "hidden": "n_embd",
        "ffn": "n_inner",
        "heads": "n_head",
        "kv_heads": "n_head",
        "positions": "n_positions",
        "vocab": "vocab_size",
    },
    defaults={"ffn": "4*hidden"},
)

VARIANTS = (
    FAMILY,
    dataclasses.replace(
        FAMILY,
        requires={**FAMILY.requires, "scale_attn_by_inverse_layer_idx": True},
        uncut={"layers": "each divides its attention by its number (scale_attn_by_inverse_layer_idx)"},
    ),
)
