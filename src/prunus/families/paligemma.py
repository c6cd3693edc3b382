"""PaliGemma, around a decoder of any family; its connector is one projection."""

import dataclasses

from prunus.families import gemma
from prunus.families._vision import PROJECTOR, like_llava
from prunus.families.family import AS_IT_IS, Family


def around(text: Family) -> Family:
    """The family of a PaliGemma with a decoder of this one."""
    connectors = (f"{PROJECTOR}linear.weight", f"{PROJECTOR}linear.bias")
    family = like_llava(text, "paligemma", {connectors[0]: ("hidden", AS_IT_IS)}, connectors)
    return dataclasses.replace(
        family, other_fields={"projection_dim": "hidden", "vision_config.projection_dim": "hidden"}
    )


FAMILY = around(gemma.FAMILY)
