"""Qwen3.5 mixtures: the attention of Qwen3.5, the experts of Qwen3-Next."""

import dataclasses

from prunus.families import qwen2_moe, qwen3_5_text, qwen3_next
from prunus.families._decoder import ATTENTION

FAMILY = dataclasses.replace(
    qwen3_next.FAMILY,
    model_type="qwen3_5_moe_text",
    layer_weights={**qwen2_moe.FAMILY.layer_weights, **qwen3_next.GATED, **qwen3_next.QK_NORMS, **qwen3_5_text.DELTA},
    branches=(ATTENTION, qwen3_5_text.LINEAR_ATTENTION, qwen2_moe.FAMILY.branches[-1]),
    branch_layers={},
    further_layers=qwen3_5_text.FURTHER_LAYERS,
)
