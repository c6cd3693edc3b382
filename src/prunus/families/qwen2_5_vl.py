"""Qwen2.5-VL. The vision tower's last projection is as wide as the residual stream."""

import dataclasses

from prunus.families import qwen2
from prunus.families._decoder import Weights
from prunus.families._vision import LANGUAGE_MODEL, with_vision
from prunus.families.family import AS_IT_IS

CONNECTOR: Weights = {"model.visual.merger.mlp.2.weight": ("hidden", AS_IT_IS)}

FAMILY = with_vision(
    dataclasses.replace(qwen2.FAMILY, constraints=("hidden_is_heads", "even_head_dim"), ignores_positions=True),
    "qwen2_5_vl",
    vision=("model.visual.",),
    connector=CONNECTOR,
    stored_prefixes=((LANGUAGE_MODEL, "model."), ("model.visual.", "visual.")),
    other_fields={"vision_config.out_hidden_size": "hidden"},
)
