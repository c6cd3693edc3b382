"""Granite 4: layers of Mamba-2 or attention, each with experts (or none) and an FFN that sees every token beside them.
Constant factors stay as they are."""

import dataclasses

from prunus.families import granitemoe
from prunus.families._decoder import ATTENTION, BAMBA_FIELDS, FFN, Weights, mamba, mamba_weights

SHARED: Weights = {
    "shared_mlp.input_linear.weight": ("2*ffn", "hidden"),
    "shared_mlp.output_linear.weight": ("hidden", "ffn"),
}

SHARED_FFN = dataclasses.replace(
    FFN,
    module="shared_mlp",
    reads=("shared_mlp.input_linear",),
    write="shared_mlp.output_linear",
    gate=None,
)

EXPERTS = granitemoe.FAMILY.branches[1]

WITH_EXPERTS = dataclasses.replace(
    granitemoe.FAMILY,
    model_type="granitemoehybrid",
    layer_weights={**granitemoe.FAMILY.layer_weights, **mamba_weights("mamba"), **SHARED},
    branches=(
        ATTENTION,
        mamba("mamba", "input_layernorm"),
        EXPERTS,
        dataclasses.replace(SHARED_FFN, beside=True),
    ),
    gated_norms={"mamba.norm": "mamba_groups"},
    constraints=("aligned_experts", "mamba_is_expand"),
    ignores_positions=True,
    fields={**granitemoe.FAMILY.fields, "ffn": "shared_intermediate_size"} | BAMBA_FIELDS | {"expand": "mamba_expand"},
    per_layer_fields=("layer_types",),
    # Where no layer has them (Granite 4 Micro), its config still checks that they are expand × hidden.
    fixed={"mamba_n_heads": 1, "mamba_d_head": "auto"},
)

WITHOUT = dataclasses.replace(
    WITH_EXPERTS,
    branches=(*WITH_EXPERTS.branches[:2], SHARED_FFN),
    requires={"num_local_experts": 0},
)

VARIANTS = (WITHOUT, WITH_EXPERTS)
