"""Models that see: a vision tower, a connector that writes what it saw to the residual stream, and a decoder."""

import dataclasses

from prunus.families._decoder import Weights
from prunus.families.family import AS_IT_IS, Family

LANGUAGE_MODEL = "model.language_model."


def with_vision(
    text: Family,
    model_type: str,
    *,
    vision: tuple[str, ...],
    connector: Weights,
    connectors: tuple[str, ...] = (),
    language_model: str = LANGUAGE_MODEL,
    stored_prefixes: tuple[tuple[str, str], ...] = (),
    other_fields: dict[str, str] | None = None,
    first_layers: str | int = 0,
) -> Family:
    """The family of a model whose decoder is of the family `text`; see `Family` for the others.

    Args:
        connector: dimensions of the connector's weights that the decoder's sizes decide.
        language_model: what names of the decoder begin with, where a model of text alone has `model.`.
    """

    def moved(name: str) -> str:
        return language_model + name.removeprefix("model.") if name.startswith("model.") else name

    return dataclasses.replace(
        text,
        model_type=model_type,
        outer_weights={moved(name): units for name, units in text.outer_weights.items()} | connector,
        final_norm=moved(text.final_norm),
        embedding=moved(text.embedding),
        layer_prefix=moved(text.layer_prefix),
        nested="text_config",
        vision=vision,
        connectors=connectors,
        stored_prefixes=stored_prefixes,
        other_fields=other_fields or {},
        first_layers=first_layers,
    )


LLAVA_PREFIXES = (
    ("lm_head.", "language_model.lm_head."),
    (LANGUAGE_MODEL, "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)
"""How LLaVA and its kin are stored; the tower of older checkpoints under a name of its own."""

PROJECTOR = "model.multi_modal_projector."
TWO_LAYERS: Weights = {
    f"{PROJECTOR}linear_1.weight": ("hidden", AS_IT_IS),
    f"{PROJECTOR}linear_2.weight": ("hidden", "hidden"),
}
"""A connector whose inner neurons are as many as hidden channels, so that both are cut together."""


def like_llava(
    text: Family, model_type: str, connector: Weights = TWO_LAYERS, connectors: tuple[str, ...] = ()
) -> Family:
    """The family of a model that is built, and stored, as LLaVA is."""
    return with_vision(
        text,
        model_type,
        vision=("model.vision_tower.", PROJECTOR),
        connector=connector,
        connectors=connectors,
        stored_prefixes=LLAVA_PREFIXES,
    )
