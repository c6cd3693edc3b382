"""Mamba-2: no attention, no FFN. hidden and the heads are cut together, as the config allows only expand × hidden."""

from prunus.families._decoder import Weights, mamba, mamba_fields, mamba_weights
from prunus.families.family import Family

OUTER: Weights = {
    "backbone.embeddings.weight": ("vocab", "hidden"),
    "backbone.norm_f.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

FAMILY = Family(
    model_type="mamba2",
    layer_weights=mamba_weights("mixer") | {"norm.weight": ("hidden",)},
    outer_weights=OUTER,
    layer_prefix="backbone.layers.",
    branches=(mamba("mixer", "norm"),),
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
    gated_norms={"mixer.norm": "mamba_groups"},
    constraints=("mamba_is_expand",),
    fields={"layers": "num_hidden_layers", "hidden": "hidden_size", "vocab": "vocab_size"}
    | mamba_fields("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size", expand="expand"),
    other_fields={"intermediate_size": "mamba_heads*mamba_head_dim"},
)
