"""dots.llm1. The first layers are dense; a router with a correction per expert picks among groups of experts, and
shared experts see every token."""

import dataclasses

from prunus.families import deepseek_v3
from prunus.families._decoder import ATTENTION, ATTENTION_WEIGHTS, QK_NORMS, expert_fields

OTHERS = {
    name: dims for name, dims in deepseek_v3.WITH_LATENT.layer_weights.items() if not name.startswith("self_attn")
}

FAMILY = dataclasses.replace(
    deepseek_v3.WITH_LATENT,
    model_type="dots1",
    layer_weights={**ATTENTION_WEIGHTS, **QK_NORMS, **OTHERS},
    branches=(ATTENTION, *deepseek_v3.WITH_LATENT.branches[1:]),
    norms=(),
    latents={},
    constraints=("even_head_dim", "aligned_experts", "grouped_experts", "reachable_experts"),
    fields=expert_fields(
        "n_routed_experts",
        "moe_intermediate_size",
        shared_experts="n_shared_experts",
        expert_groups="n_group",
        chosen_groups="topk_group",
    ),
    cached="2*kv_heads*head_dim",
    per_layer_fields=("layer_types",),
    further_layers=None,
)
