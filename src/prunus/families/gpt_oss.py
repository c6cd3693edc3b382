"""gpt-oss, once its MXFP4 weights are decompressed. Experts' weights are [inputs, outputs], gate and up in turns, with
biases; each head has a sink, a logit that nothing is attended to for."""

import dataclasses

from prunus.families._decoder import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    EXPERTS,
    OUTER_WEIGHTS,
    PRE_NORMS,
    Weights,
    expert_fields,
)
from prunus.families.family import Family

OWN: Weights = {
    "self_attn.sinks": ("heads",),
    "mlp.router.weight": ("experts", "hidden"),
    "mlp.experts.gate_up_proj": ("experts", "hidden", "expert_ffn*2"),
    "mlp.experts.gate_up_proj_bias": ("experts", "expert_ffn*2"),
    "mlp.experts.down_proj": ("experts", "expert_ffn", "hidden"),
    "mlp.experts.down_proj_bias": ("experts", "hidden"),
}

FAMILY = Family(
    model_type="gpt_oss",
    layer_weights=ATTENTION_WEIGHTS | PRE_NORMS | OWN,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, dataclasses.replace(EXPERTS, reads=("mlp.router",))),
    constraints=("even_head_dim", "aligned_experts"),
    fields=expert_fields("num_local_experts", "intermediate_size"),
    other_fields={"experts_per_token": "top_k"},
    ignores_positions=True,
    per_layer_fields=("layer_types",),
)
