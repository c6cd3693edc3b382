"""OLMoE. One norm spans all queries, another all keys."""

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
)
from prunus.families.family import Family

NORMS: Weights = {
    "self_attn.q_norm.weight": ("heads*head_dim",),
    "self_attn.k_norm.weight": ("kv_heads*head_dim",),
}

FAMILY = Family(
    model_type="olmoe",
    layer_weights=ATTENTION_WEIGHTS | PRE_NORMS | EXPERT_WEIGHTS | NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, EXPERTS),
    norms=("self_attn.q_norm", "self_attn.k_norm"),
    constraints=("even_head_dim", "hidden_is_heads", "aligned_experts"),
    fields=expert_fields("num_experts", "intermediate_size"),
    stored_as=STORED_EXPERTS,
)
