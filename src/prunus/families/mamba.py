"""Mamba: no attention, no FFN."""

from prunus.families import mamba2
from prunus.families._decoder import MAMBA1_DERIVED, mamba, mamba1_weights
from prunus.families.family import Family

FAMILY = Family(
    model_type="mamba",
    layer_weights=mamba1_weights("mixer") | {"norm.weight": ("hidden",)},
    outer_weights=mamba2.OUTER,
    layer_prefix="backbone.layers.",
    branches=(mamba("mixer", "norm"),),
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
    constraints=(),
    derived=MAMBA1_DERIVED,
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "state": "state_size",
        "convolution": "conv_kernel",
        "dt_rank": "time_step_rank",
        "mamba_heads": "intermediate_size",
    },
    other_fields={"d_model": "hidden", "d_inner": "mamba_heads", "n_layer": "layers"},
)
