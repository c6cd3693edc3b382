"""Mixtral. The expert's width is `intermediate_size`; its weights are w1 (gate), w3 (up) and w2 (down) in the files."""

from prunus.families._decoder import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    EXPERT_WEIGHTS,
    EXPERTS,
    OUTER_WEIGHTS,
    PRE_NORMS,
    expert_fields,
)
from prunus.families.family import Family

FAMILY = Family(
    model_type="mixtral",
    layer_weights=ATTENTION_WEIGHTS | PRE_NORMS | EXPERT_WEIGHTS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, EXPERTS),
    constraints=("even_head_dim", "aligned_experts"),
    fields=expert_fields("num_local_experts", "intermediate_size"),
    stored_as={
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.*.w2.weight",),
    },
)
