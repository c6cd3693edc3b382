"""Mistral Small 3.1 and its kin, around a decoder of any family; image patches are merged before the connector."""

from prunus.families import mistral
from prunus.families._vision import like_llava
from prunus.families.family import Family


def around(text: Family) -> Family:
    """The family of such a model with a decoder of this one."""
    return like_llava(text, "mistral3")


FAMILY = around(mistral.FAMILY)
