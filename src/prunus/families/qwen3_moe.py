"""Qwen3's mixtures of experts. Some layers may be dense (`mlp_only_layers`, `decoder_sparse_step`)."""

from prunus.families._decoder import (
    ATTENTION,
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    OUTER_WEIGHTS,
    PRE_NORMS,
    PROJECTIONS,
    QK_NORMS,
    STORED_EXPERTS,
    expert_fields,
)
from prunus.families.family import Family

FAMILY = Family(
    model_type="qwen3_moe",
    layer_weights=PROJECTIONS | PRE_NORMS | QK_NORMS | EXPERT_WEIGHTS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, FFN, EXPERTS),
    constraints=("even_head_dim", "aligned_experts"),
    fields=expert_fields("num_local_experts", "moe_intermediate_size"),
    stored_as=STORED_EXPERTS,
    branch_layers={"mlp_only_layers": "ffn"},
    fixed={"decoder_sparse_step": 1},
)
