"""FlexOlmo. As OLMo 2, with experts."""

import dataclasses

from prunus.families import olmo2, olmoe
from prunus.families._decoder import ATTENTION_WEIGHTS, EXPERT_WEIGHTS, EXPERTS

FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    model_type="flex_olmo",
    layer_weights=ATTENTION_WEIGHTS | EXPERT_WEIGHTS | olmo2.NORMS,
    branches=(
        olmo2.FAMILY.branches[0],
        dataclasses.replace(EXPERTS, norm=None, post_norm="post_feedforward_layernorm"),
    ),
    constraints=("even_head_dim", "aligned_experts"),
    elsewhere={},
    fields=olmoe.FAMILY.fields,
    stored_as=olmoe.FAMILY.stored_as,
)
