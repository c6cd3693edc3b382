"""Falcon-H1: Mamba-2 and attention side by side in every layer, then an FFN. Constant factors stay as they are."""

import dataclasses

from prunus.families import bamba
from prunus.families._decoder import ATTENTION, BAMBA_FIELDS, FIELDS, mamba

MAMBA = dataclasses.replace(mamba("mamba", "input_layernorm"), write_scale="ssm_out_multiplier")

VARIANTS = tuple(
    dataclasses.replace(
        bamba.FAMILY,
        model_type="falcon_h1",
        layer_weights={
            name: dims for name, dims in bamba.FAMILY.layer_weights.items() if normed or name != "mamba.norm.weight"
        },
        branches=(
            MAMBA,
            dataclasses.replace(
                ATTENTION,
                beside=True,
                read_scale="attention_in_multiplier",
                write_scale="attention_out_multiplier",
            ),
            dataclasses.replace(bamba.OWN_FFN, module_scale="down_multiplier"),
        ),
        gated_norms={"mamba.norm": "mamba_groups"} if normed else {},
        constraints=("even_head_dim",),
        requires={"mamba_rms_norm": normed} | ({"mamba_norm_before_gate": False} if normed else {}),
        fields=FIELDS | BAMBA_FIELDS | {"inner": "mamba_d_ssm"},
        derived={"inner": "mamba_heads*mamba_head_dim"},
        branch_layers={},
    )
    for normed in (False, True)
)
