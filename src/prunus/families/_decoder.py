"""The tables that Llama-like decoders share. A family file picks from them; it adds what is its own."""

from prunus.families.family import Branch

Weights = dict[str, tuple[str, ...]]

OUTER_WEIGHTS: Weights = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

PROJECTIONS: Weights = {
    "self_attn.q_proj.weight": ("heads*head_dim", "hidden"),
    "self_attn.k_proj.weight": ("kv_heads*head_dim", "hidden"),
    "self_attn.v_proj.weight": ("kv_heads*head_dim", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "heads*head_dim"),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}

PRE_NORMS: Weights = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}

QK_NORMS: Weights = {
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
}

ATTENTION = Branch(
    name="attention",
    module="self_attn",
    norm="input_layernorm",
    reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    write="self_attn.o_proj",
    inner="heads",
)

FFN = Branch(
    name="ffn",
    module="mlp",
    norm="post_attention_layernorm",
    reads=("mlp.gate_proj", "mlp.up_proj"),
    write="mlp.down_proj",
    inner="ffn",
    gate="mlp.gate_proj",
)
