"""Aya Vision, around a decoder of any family; the inside of its connector has a size of its own."""

from prunus.families import cohere2
from prunus.families._vision import PROJECTOR, like_llava
from prunus.families.family import AS_IT_IS, Family


def around(text: Family) -> Family:
    """The family of an Aya Vision with a decoder of this one."""
    return like_llava(text, "aya_vision", {f"{PROJECTOR}linear_2.weight": ("hidden", AS_IT_IS)})


FAMILY = around(cohere2.FAMILY)
