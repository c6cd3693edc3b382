"""StableLM 2. LayerNorm; hidden and heads are cut together, as its attention has no head_dim of its own."""

import dataclasses

from prunus.families import helium
from prunus.families._decoder import OUTER_WEIGHTS

FAMILY = dataclasses.replace(
    helium.FAMILY,
    model_type="stablelm",
    outer_weights=OUTER_WEIGHTS | {"model.norm.bias": ("hidden",)},
    centred=True,
    requires={"use_parallel_residual": False},
    constraints=("even_head_dim", "hidden_is_heads", "heads_divide_hidden"),
)
