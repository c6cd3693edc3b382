"""Qwen2-VL: as Qwen2.5-VL, with another vision tower."""

import dataclasses

from prunus.families import qwen2_5_vl

FAMILY = dataclasses.replace(
    qwen2_5_vl.FAMILY, model_type="qwen2_vl", other_fields={"vision_config.hidden_size": "hidden"}
)
