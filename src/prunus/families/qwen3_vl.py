"""Qwen3-VL. Behind each of the first layers more of what the vision tower saw is added to the stream (DeepStack), so
these layers stay."""

import dataclasses

from prunus.families import qwen3
from prunus.families._decoder import Weights
from prunus.families._vision import with_vision
from prunus.families.family import AS_IT_IS

MOST_MERGERS = 8
MERGERS = ("merger", *(f"deepstack_merger_list.{number}" for number in range(MOST_MERGERS)))
CONNECTOR: Weights = {f"model.visual.{merger}.linear_fc2.weight": ("hidden", AS_IT_IS) for merger in MERGERS}

FAMILY = with_vision(
    dataclasses.replace(qwen3.FAMILY, per_layer_fields=(), layer_count_fields=()),
    "qwen3_vl",
    vision=("model.visual.",),
    connector=CONNECTOR,
    other_fields={"vision_config.out_hidden_size": "hidden"},
    first_layers="vision_config.deepstack_visual_indexes",
)
