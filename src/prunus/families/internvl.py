"""InternVL 3, around a decoder of any family."""

from prunus.families import qwen2
from prunus.families._vision import like_llava
from prunus.families.family import Family


def around(text: Family) -> Family:
    """The family of an InternVL with a decoder of this one."""
    return like_llava(text, "internvl")


FAMILY = around(qwen2.FAMILY)
