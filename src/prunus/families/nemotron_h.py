"""Nemotron-H and Nemotron 3 Nano: each layer is one branch, of Mamba-2, attention, an FFN or experts (both relu²,
without gates). Depth is cut branch by branch."""

import dataclasses

from prunus.families._decoder import ATTENTION, EXPERTS, FFN, Weights, expert_fields, mamba, mamba_fields, mamba_weights
from prunus.families.family import Family

OUTER: Weights = {
    "model.embeddings.weight": ("vocab", "hidden"),
    "model.norm_f.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

OWN: Weights = {
    "norm.weight": ("hidden",),
    "mixer.q_proj.weight": ("heads*head_dim", "hidden"),
    "mixer.k_proj.weight": ("kv_heads*head_dim", "hidden"),
    "mixer.v_proj.weight": ("kv_heads*head_dim", "hidden"),
    "mixer.o_proj.weight": ("hidden", "heads*head_dim"),
    "mixer.up_proj.weight": ("ffn", "hidden"),
    "mixer.down_proj.weight": ("hidden", "ffn"),
    "mixer.gate.weight": ("experts", "hidden"),
    "mixer.gate.e_score_correction_bias": ("experts",),
    "mixer.experts.up_proj": ("experts", "expert_ffn", "hidden"),
    "mixer.experts.down_proj": ("experts", "hidden", "expert_ffn"),
    "mixer.shared_experts.up_proj.weight": ("shared_ffn", "hidden"),
    "mixer.shared_experts.down_proj.weight": ("hidden", "shared_ffn"),
}

FAMILY = Family(
    model_type="nemotron_h",
    layer_weights=mamba_weights("mixer") | OWN,
    outer_weights=OUTER,
    branches=(
        mamba("mixer", "norm"),
        dataclasses.replace(
            ATTENTION,
            module="mixer",
            norm="norm",
            reads=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
            write="mixer.o_proj",
        ),
        dataclasses.replace(
            FFN, module="mixer", norm="norm", reads=("mixer.up_proj",), write="mixer.down_proj", gate="mixer.up_proj"
        ),
        dataclasses.replace(
            EXPERTS,
            module="mixer",
            norm="norm",
            reads=("mixer.gate", "mixer.shared_experts.up_proj"),
            write="mixer.shared_experts.down_proj",
            inner="shared_ffn",
            gate="mixer.shared_experts.up_proj",
            experts="mixer.experts",
        ),
    ),
    embedding="model.embeddings",
    final_norm="model.norm_f",
    gated_norms={"mixer.norm": "mamba_groups"},
    buffers=("mixer.gate.e_score_correction_bias",),
    constraints=("aligned_experts", "grouped_experts", "reachable_experts"),
    requires={"moe_latent_size": None},
    fields=expert_fields(
        "n_routed_experts",
        "moe_intermediate_size",
        shared_ffn="moe_shared_expert_intermediate_size",
        expert_groups="n_group",
        chosen_groups="topk_group",
    )
    | mamba_fields("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size"),
    per_layer_fields=("layers_block_type",),
    further_layers="num_nextn_predict_layers",
    stored_prefixes=(("model.", "backbone."),),
    stored_as={
        "mixer.experts.up_proj": ("mixer.experts.*.up_proj.weight",),
        "mixer.experts.down_proj": ("mixer.experts.*.down_proj.weight",),
    },
)
