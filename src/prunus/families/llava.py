"""LLaVA 1.5, around a decoder of any family. The connector's inner neurons are as many as hidden channels, so that both
are cut together."""

from prunus.families import llama
from prunus.families._decoder import Weights
from prunus.families._vision import LLAVA_PREFIXES, with_vision
from prunus.families.family import AS_IT_IS, Family

CONNECTOR: Weights = {
    "model.multi_modal_projector.linear_1.weight": ("hidden", AS_IT_IS),
    "model.multi_modal_projector.linear_2.weight": ("hidden", "hidden"),
}


def around(text: Family) -> Family:
    """The family of a LLaVA with a decoder of this one."""
    return with_vision(
        text,
        "llava",
        vision=("model.vision_tower.", "model.multi_modal_projector."),
        connector=CONNECTOR,
        stored_prefixes=LLAVA_PREFIXES,
    )


FAMILY = around(llama.FAMILY)
