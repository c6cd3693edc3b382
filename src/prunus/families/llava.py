"""LLaVA 1.5, around a decoder of any family."""

from prunus.families import llama
from prunus.families._vision import like_llava
from prunus.families.family import Family


def around(text: Family) -> Family:
    """The family of a LLaVA with a decoder of this one."""
    return like_llava(text, "llava")


FAMILY = around(llama.FAMILY)
