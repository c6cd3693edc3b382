"""GPT-BigCode (StarCoder, SantaCoder). GPT-2 with linear projections and one key and value for all heads."""

import dataclasses

from prunus.families import gpt2
from prunus.families._decoder import Weights

LAYER: Weights = {
    "ln_1.weight": ("hidden",),
    "attn.c_attn.weight": ("heads*head_dim + 2*head_dim", "hidden"),
    "attn.c_proj.weight": ("hidden", "heads*head_dim"),
    "ln_2.weight": ("hidden",),
    "mlp.c_fc.weight": ("ffn", "hidden"),
    "mlp.c_proj.weight": ("hidden", "ffn"),
}

FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    model_type="gpt_bigcode",
    layer_weights=LAYER,
    transposed=False,
    constraints=(
        "hidden_is_heads",
        "heads_divide_hidden",
    ),
    requires={"add_cross_attention": False, "multi_query": True},
    fields={size: key for size, key in gpt2.FAMILY.fields.items() if size != "kv_heads"},
    defaults={"ffn": "4*hidden", "kv_heads": "1"},
)
