"""GPT-J. One LayerNorm feeds both branches, which run side by side; hidden and heads are cut together, as attention has
no head_dim of its own."""

import dataclasses

from prunus.families import gpt2
from prunus.families._decoder import Weights

LAYER: Weights = {
    "ln_1.weight": ("hidden",),
    "attn.q_proj.weight": ("heads*head_dim", "hidden"),
    "attn.k_proj.weight": ("heads*head_dim", "hidden"),
    "attn.v_proj.weight": ("heads*head_dim", "hidden"),
    "attn.out_proj.weight": ("hidden", "heads*head_dim"),
    "mlp.fc_in.weight": ("ffn", "hidden"),
    "mlp.fc_out.weight": ("hidden", "ffn"),
}

OUTER: Weights = {
    "transformer.wte.weight": ("vocab", "hidden"),
    "transformer.ln_f.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
    "lm_head.bias": ("vocab",),
}

ATTENTION, FFN = gpt2.FAMILY.branches

FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    model_type="gptj",
    layer_weights=LAYER,
    outer_weights=OUTER,
    branches=(
        dataclasses.replace(ATTENTION, reads=("attn.q_proj", "attn.k_proj", "attn.v_proj"), write="attn.out_proj"),
        dataclasses.replace(FFN, norm="ln_1", reads=("mlp.fc_in",), write="mlp.fc_out", gate="mlp.fc_in", beside=True),
    ),
    transposed=False,
    requires={},
    fields={size: key for size, key in gpt2.FAMILY.fields.items() if size != "positions"},
)
