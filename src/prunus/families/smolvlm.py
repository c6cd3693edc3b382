"""SmolVLM: Idefics 3 with another vision tower."""

from prunus.families import idefics3, llama
from prunus.families.family import Family


def around(text: Family) -> Family:
    """The family of such a model with a decoder of this one."""
    return idefics3.around(text, "smolvlm")


FAMILY = around(llama.FAMILY)
