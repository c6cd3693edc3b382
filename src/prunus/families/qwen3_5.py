"""Qwen3.5 with its vision tower."""

from prunus.families import qwen3_5_text
from prunus.families._vision import with_vision
from prunus.families.family import AS_IT_IS, Family


def seeing(text: Family, model_type: str) -> Family:
    """The family of a model with a tower before a decoder of this one."""
    return with_vision(
        text,
        model_type,
        vision=("model.visual.",),
        connector={"model.visual.merger.linear_fc2.weight": ("hidden", AS_IT_IS)},
        other_fields={"vision_config.out_hidden_size": "hidden"},
    )


FAMILY = seeing(qwen3_5_text.FAMILY, "qwen3_5")
