"""The tables that Llama-like decoders share. A family file picks from them; it adds what is its own."""

import dataclasses

from prunus.families.family import FIELDS, Branch

Weights = dict[str, tuple[str, ...]]

SQUARE = ("hidden_is_heads",)
"""What code keeps to that takes queries to be as wide as the stream; see `Family.elsewhere`."""

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

EXPERTS = Branch(
    name="experts",
    module="mlp",
    norm="post_attention_layernorm",
    reads=("mlp.gate",),
    write=None,
    inner="",
    experts="mlp.experts",
)

EXPERT_WEIGHTS: Weights = {
    "mlp.gate.weight": ("experts", "hidden"),
    "mlp.experts.gate_up_proj": ("experts", "2*expert_ffn", "hidden"),
    "mlp.experts.down_proj": ("experts", "hidden", "expert_ffn"),
}

STORED_EXPERTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.*.down_proj.weight",),
}

ATTENTION_WEIGHTS: Weights = {name: dims for name, dims in PROJECTIONS.items() if name.startswith("self_attn")}


def expert_fields(experts: str, expert_ffn: str, top_k: str = "num_experts_per_tok", **others: str) -> dict[str, str]:
    """Config key of each size of a mixture of experts."""
    own = {"experts": experts, "expert_ffn": expert_ffn, "top_k": top_k, **others}
    return {size: key for size, key in FIELDS.items() if key not in own.values()} | own


def shared_expert(module: str) -> Weights:
    """Weights of an expert that sees every token."""
    return {
        f"{module}.gate_proj.weight": ("shared_ffn", "hidden"),
        f"{module}.up_proj.weight": ("shared_ffn", "hidden"),
        f"{module}.down_proj.weight": ("hidden", "shared_ffn"),
    }


def with_shared_expert(branch: Branch, module: str) -> Branch:
    """The same branch with such an expert beside the routed ones."""
    return dataclasses.replace(
        branch,
        reads=(*branch.reads, f"{module}.gate_proj", f"{module}.up_proj"),
        write=f"{module}.down_proj",
        inner="shared_ffn",
        gate=f"{module}.gate_proj",
    )


def mamba_weights(module: str) -> Weights:
    """Weights of a Mamba-2 layer: z, x, B, C and dt come from one projection, x, B and C go through one convolution."""
    convolved = "mamba_heads*mamba_head_dim + 2*mamba_groups*state"
    return {
        f"{module}.in_proj.weight": (f"mamba_heads*mamba_head_dim + {convolved} + mamba_heads", "hidden"),
        f"{module}.conv1d.weight": (convolved, "1", "convolution"),
        f"{module}.conv1d.bias": (convolved,),
        f"{module}.dt_bias": ("mamba_heads",),
        f"{module}.A_log": ("mamba_heads",),
        f"{module}.D": ("mamba_heads",),
        f"{module}.norm.weight": ("mamba_heads*mamba_head_dim",),
        f"{module}.out_proj.weight": ("hidden", "mamba_heads*mamba_head_dim"),
    }


def mamba1_weights(module: str) -> Weights:
    """Weights of a layer of the first Mamba: heads of one channel and one group. B, C and the latent dt are made from
    x behind the convolution."""
    return {
        f"{module}.in_proj.weight": ("2*mamba_heads*mamba_head_dim", "hidden"),
        f"{module}.conv1d.weight": ("mamba_heads*mamba_head_dim", "1", "convolution"),
        f"{module}.conv1d.bias": ("mamba_heads*mamba_head_dim",),
        f"{module}.x_proj.weight": ("dt_rank + 2*mamba_groups*state", "mamba_heads*mamba_head_dim"),
        f"{module}.dt_proj.weight": ("mamba_heads*mamba_head_dim", "dt_rank"),
        f"{module}.A_log": ("mamba_heads*mamba_head_dim", "state"),
        f"{module}.D": ("mamba_heads*mamba_head_dim",),
        f"{module}.out_proj.weight": ("hidden", "mamba_heads*mamba_head_dim"),
    }


MAMBA1_DERIVED = {"mamba_head_dim": "1", "mamba_groups": "1"}


def mamba(module: str, norm: str) -> Branch:
    """The branch of a Mamba layer."""
    return Branch(
        name="mamba",
        module=module,
        norm=norm,
        reads=(f"{module}.in_proj",),
        write=f"{module}.out_proj",
        inner="mamba_heads",
    )


def mamba_fields(
    heads: str, head_dim: str, state: str, groups: str, convolution: str, chunk: str, **others: str
) -> dict[str, str]:
    """Config key of each size of such a layer."""
    return {
        "mamba_heads": heads,
        "mamba_head_dim": head_dim,
        "state": state,
        "mamba_groups": groups,
        "convolution": convolution,
        "chunk": chunk,
        **others,
    }


BAMBA_FIELDS = mamba_fields(
    "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv", "mamba_chunk_size"
)
"""As Bamba's config names them, and those that follow it."""
