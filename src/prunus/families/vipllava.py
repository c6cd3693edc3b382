"""ViP-LLaVA, around a decoder of any family; its connector reads several layers of the tower."""

from prunus.families import llama
from prunus.families._vision import like_llava
from prunus.families.family import Family


def around(text: Family) -> Family:
    """The family of a ViP-LLaVA with a decoder of this one."""
    return like_llava(text, "vipllava")


FAMILY = around(llama.FAMILY)
