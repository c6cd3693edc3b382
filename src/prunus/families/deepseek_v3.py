"""DeepSeek-V3 and R1. Keys and values, and in most models queries, are made from latents (MLA); the first layers are
dense; a router with a correction per expert picks among groups of experts, and a shared expert sees every token."""

import dataclasses

from prunus.families._decoder import (
    ATTENTION,
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    OUTER_WEIGHTS,
    PRE_NORMS,
    PROJECTIONS,
    STORED_EXPERTS,
    Weights,
    expert_fields,
    shared_expert,
    with_shared_expert,
)
from prunus.families.family import Family

MLA: Weights = {
    "self_attn.q_a_proj.weight": ("q_rank", "hidden"),
    "self_attn.q_a_layernorm.weight": ("q_rank",),
    "self_attn.q_b_proj.weight": ("heads*(nope_dim + rope_dim)", "q_rank"),
    "self_attn.kv_a_proj_with_mqa.weight": ("kv_rank + rope_dim", "hidden"),
    "self_attn.kv_a_layernorm.weight": ("kv_rank",),
    "self_attn.kv_b_proj.weight": ("heads*(nope_dim + value_dim)", "kv_rank"),
    "self_attn.o_proj.weight": ("hidden", "heads*value_dim"),
}

DENSE: Weights = {name: dims for name, dims in PROJECTIONS.items() if name.startswith("mlp")}

WITH_LATENT = Family(
    model_type="deepseek_v3",
    layer_weights=MLA
    | DENSE
    | PRE_NORMS
    | EXPERT_WEIGHTS
    | shared_expert("mlp.shared_experts")
    | {"mlp.gate.e_score_correction_bias": ("experts",)},
    outer_weights=OUTER_WEIGHTS,
    branches=(
        dataclasses.replace(ATTENTION, reads=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        FFN,
        with_shared_expert(EXPERTS, "mlp.shared_experts"),
    ),
    norms=("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    latents={"q_rank": "self_attn.q_a_layernorm", "kv_rank": "self_attn.kv_a_layernorm"},
    buffers=("mlp.gate.e_score_correction_bias",),
    constraints=("multi_head", "aligned_experts", "grouped_experts", "reachable_experts"),
    fields=expert_fields(
        "n_routed_experts",
        "moe_intermediate_size",
        shared_experts="n_shared_experts",
        expert_groups="n_group",
        chosen_groups="topk_group",
        q_rank="q_lora_rank",
        kv_rank="kv_lora_rank",
        nope_dim="qk_nope_head_dim",
        rope_dim="qk_rope_head_dim",
        value_dim="v_head_dim",
    ),
    derived={"shared_ffn": "shared_experts*expert_ffn"},
    cached="kv_rank + rope_dim",
    layer_count_fields=("first_k_dense_replace",),
    further_layers="num_nextn_predict_layers",
    stored_as=STORED_EXPERTS,
)

DIRECT: Weights = {"self_attn.q_proj.weight": ("heads*(nope_dim + rope_dim)", "hidden")}

WITHOUT = dataclasses.replace(
    WITH_LATENT,
    layer_weights={name: dims for name, dims in WITH_LATENT.layer_weights.items() if ".q_" not in name} | DIRECT,
    branches=(
        dataclasses.replace(ATTENTION, reads=("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")),
        *WITH_LATENT.branches[1:],
    ),
    norms=("self_attn.kv_a_layernorm",),
    latents={"kv_rank": "self_attn.kv_a_layernorm"},
    requires={"q_lora_rank": None},
)

VARIANTS = (WITHOUT, WITH_LATENT)
