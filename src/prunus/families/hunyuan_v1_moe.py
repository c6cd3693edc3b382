"""Hunyuan's mixtures of experts, one of which is shared. Queries and keys are normed per head, behind the rotation.
Sizes of experts may be listed for each layer; transformers reads their width elsewhere than vLLM and llama.cpp do."""

import dataclasses

from prunus.families._decoder import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    EXPERT_WEIGHTS,
    EXPERTS,
    OUTER_WEIGHTS,
    PRE_NORMS,
    STORED_EXPERTS,
    Weights,
    expert_fields,
    shared_expert,
    with_shared_expert,
)
from prunus.families.family import Family

OWN: Weights = {
    "mlp.gate.wg.weight": ("experts", "hidden"),
    "self_attn.query_layernorm.weight": ("head_dim",),
    "self_attn.key_layernorm.weight": ("head_dim",),
}
ROUTED: Weights = {name: dims for name, dims in EXPERT_WEIGHTS.items() if name != "mlp.gate.weight"}

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    layer_weights=ATTENTION_WEIGHTS | PRE_NORMS | ROUTED | OWN | shared_expert("mlp.shared_mlp"),
    outer_weights=OUTER_WEIGHTS,
    branches=(
        ATTENTION,
        with_shared_expert(dataclasses.replace(EXPERTS, reads=("mlp.gate.wg",)), "mlp.shared_mlp"),
    ),
    constraints=("even_head_dim", "aligned_experts"),
    fields=expert_fields("num_experts", "intermediate_size", "moe_topk"),
    derived={"shared_ffn": "1*expert_ffn"},
    other_fields={"moe_intermediate_size": "expert_ffn"},
    per_layer_fields=("num_shared_expert",),
    stored_as=STORED_EXPERTS,
)
