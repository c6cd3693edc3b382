"""Qwen3.5 (dense): as Qwen3-Next, but linear attention reads through four projections, and every layer has an FFN."""

import dataclasses

from prunus.families import qwen3_next
from prunus.families._decoder import ATTENTION, FFN, PRE_NORMS, PROJECTIONS, Weights
from prunus.families.family import FIELDS

VALUES = "linear_heads*values_per_key*linear_value_dim"
DELTA: Weights = {name: units for name, units in qwen3_next.DELTA.items() if "in_proj" not in name} | {
    "linear_attn.in_proj_qkv.weight": (f"2*linear_heads*linear_key_dim + {VALUES}", "hidden"),
    "linear_attn.in_proj_z.weight": (VALUES, "hidden"),
    "linear_attn.in_proj_b.weight": ("linear_heads*values_per_key", "hidden"),
    "linear_attn.in_proj_a.weight": ("linear_heads*values_per_key", "hidden"),
}
LINEAR_ATTENTION = dataclasses.replace(
    qwen3_next.FAMILY.branches[1], reads=tuple(name.removesuffix(".weight") for name in DELTA if "in_proj" in name)
)
LINEAR_FIELDS = {size: key for size, key in qwen3_next.FAMILY.fields.items() if key.startswith("linear_")}
FURTHER_LAYERS = "mtp_num_hidden_layers"

FAMILY = dataclasses.replace(
    qwen3_next.FAMILY,
    model_type="qwen3_5_text",
    layer_weights={**PROJECTIONS, **PRE_NORMS, **qwen3_next.GATED, **qwen3_next.QK_NORMS, **DELTA},
    branches=(ATTENTION, LINEAR_ATTENTION, FFN),
    constraints=("even_head_dim",),
    fields=FIELDS | LINEAR_FIELDS,
    stored_as={},
    branch_layers={},
    further_layers=FURTHER_LAYERS,
)
