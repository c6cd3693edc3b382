"""Qwen3-Next: layers of linear attention (Gated DeltaNet) or of attention with an output gate beside each query, each
with experts, one of which is shared. Norms multiply by (1 + weight)."""

import dataclasses

from prunus.families import qwen2_moe
from prunus.families._decoder import ATTENTION, QK_NORMS, Weights
from prunus.families.family import Branch

DELTA: Weights = {
    "linear_attn.in_proj_qkvz.weight": (
        "linear_heads*(2*linear_key_dim + 2*values_per_key*linear_value_dim)",
        "hidden",
    ),
    "linear_attn.in_proj_ba.weight": ("linear_heads*2*values_per_key", "hidden"),
    "linear_attn.conv1d.weight": (
        "2*linear_heads*linear_key_dim + linear_heads*values_per_key*linear_value_dim",
        "1",
        "convolution",
    ),
    "linear_attn.dt_bias": ("linear_heads*values_per_key",),
    "linear_attn.A_log": ("linear_heads*values_per_key",),
    "linear_attn.norm.weight": ("linear_value_dim",),
    "linear_attn.out_proj.weight": ("hidden", "linear_heads*values_per_key*linear_value_dim"),
}

GATED: Weights = {"self_attn.q_proj.weight": ("heads*2*head_dim", "hidden")}

FAMILY = dataclasses.replace(
    qwen2_moe.FAMILY,
    model_type="qwen3_next",
    layer_weights={**qwen2_moe.FAMILY.layer_weights, **GATED, **QK_NORMS, **DELTA},
    branches=(
        ATTENTION,
        Branch(
            name="delta",
            module="linear_attn",
            norm="input_layernorm",
            reads=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
            write="linear_attn.out_proj",
            inner="linear_heads",
        ),
        *qwen2_moe.FAMILY.branches[1:],
    ),
    norm_offset=1.0,
    elsewhere={},
    fields={
        **qwen2_moe.FAMILY.fields,
        "linear_heads": "linear_num_key_heads",
        "linear_value_heads": "linear_num_value_heads",
        "linear_key_dim": "linear_key_head_dim",
        "linear_value_dim": "linear_value_head_dim",
        "convolution": "linear_conv_kernel_dim",
    },
    derived={"linear_value_heads": "linear_heads*values_per_key"},
    defaults={"values_per_key": "linear_value_heads // linear_heads"},
    layer_count_fields=(),
)
