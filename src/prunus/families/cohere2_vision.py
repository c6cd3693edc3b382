"""Command A Vision, around a decoder of any family: as Aya Vision, but stored under its own names."""

import dataclasses

from prunus.families import aya_vision, cohere2
from prunus.families.family import Family


def around(text: Family) -> Family:
    """The family of such a model with a decoder of this one."""
    return dataclasses.replace(aya_vision.around(text), model_type="cohere2_vision", stored_prefixes=())


FAMILY = around(cohere2.FAMILY)
