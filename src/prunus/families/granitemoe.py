"""Granite 3's mixtures of experts. Constant factors on embeddings, branches, attention and logits stay as they are."""

import dataclasses

from prunus.families import granite
from prunus.families._decoder import ATTENTION, ATTENTION_WEIGHTS, EXPERTS, PRE_NORMS, SQUARE, Weights, expert_fields

OWN: Weights = {
    "block_sparse_moe.router.weight": ("experts", "hidden"),
    "block_sparse_moe.experts.gate_up_proj": ("experts", "2*expert_ffn", "hidden"),
    "block_sparse_moe.experts.down_proj": ("experts", "hidden", "expert_ffn"),
}

FAMILY = dataclasses.replace(
    granite.FAMILY,
    model_type="granitemoe",
    layer_weights=ATTENTION_WEIGHTS | PRE_NORMS | OWN,
    branches=(
        ATTENTION,
        dataclasses.replace(
            EXPERTS,
            module="block_sparse_moe",
            reads=("block_sparse_moe.router",),
            experts="block_sparse_moe.experts",
        ),
    ),
    constraints=("even_head_dim", "aligned_experts"),
    elsewhere={"vLLM": SQUARE},
    fields=expert_fields("num_local_experts", "intermediate_size"),
    stored_as={
        "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
        "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
        "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    },
)
