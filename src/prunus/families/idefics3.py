"""Idefics 3, around a decoder of any family; its connector is one projection of pixels that were moved to channels."""

from prunus.families import llama
from prunus.families._vision import with_vision
from prunus.families.family import AS_IT_IS, Family

PROJECTION = "model.connector.modality_projection.proj.weight"


def around(text: Family, model_type: str = "idefics3") -> Family:
    """The family of such a model with a decoder of this one."""
    return with_vision(
        text,
        model_type,
        vision=("model.vision_model.", "model.connector."),
        connector={PROJECTION: ("hidden", AS_IT_IS)},
        language_model="model.text_model.",
    )


FAMILY = around(llama.FAMILY)
