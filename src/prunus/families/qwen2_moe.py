"""Qwen1.5 and Qwen2 mixtures of experts. A shared expert sees every token, weighed by a sigmoid gate; some layers may
be dense."""

import dataclasses

from prunus.families import qwen3_moe
from prunus.families._decoder import (
    ATTENTION,
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    PRE_NORMS,
    PROJECTIONS,
    SQUARE,
    Weights,
    expert_fields,
    shared_expert,
    with_shared_expert,
)

SHARED = with_shared_expert(EXPERTS, "mlp.shared_expert")
SHARED_GATE: Weights = {"mlp.shared_expert_gate.weight": ("1", "hidden")}

FAMILY = dataclasses.replace(
    qwen3_moe.FAMILY,
    model_type="qwen2_moe",
    layer_weights=PROJECTIONS | PRE_NORMS | EXPERT_WEIGHTS | shared_expert("mlp.shared_expert") | SHARED_GATE,
    branches=(
        ATTENTION,
        FFN,
        dataclasses.replace(
            SHARED, reads=(*SHARED.reads, "mlp.shared_expert_gate"), write_gate="mlp.shared_expert_gate"
        ),
    ),
    elsewhere={"llama.cpp": SQUARE, "vLLM": SQUARE},
    fields=expert_fields("num_experts", "moe_intermediate_size", shared_ffn="shared_expert_intermediate_size"),
    per_layer_fields=("layer_types",),
    layer_count_fields=("max_window_layers",),
)
