"""One file per Hugging Face `model_type`; the file's name is the type, its `FAMILY` the data. Of a model with a decoder
of any family, `around` makes the data from the decoder's."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from prunus.errors import UnsupportedModel
from prunus.families.family import Branch, Family

__all__ = ["Branch", "Family", "family_of", "known_families"]


def known_families() -> list[str]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_") and name != "family")


def family_of(model_type: str, config: Any = None) -> Family:
    """The family of a model type.

    Args:
        config: which of several variants is meant; the first one where none or no other fits.
    Raises:
        UnsupportedModel: no file describes it. Never treated as "probably Llama".
    """
    if model_type not in known_families():
        raise UnsupportedModel(
            f"model type {model_type!r} is not supported, because no family file says which of its weights carry which "
            f"axis. Known: {', '.join(known_families())}."
        )
    module = importlib.import_module(f"prunus.families.{model_type}")
    if config is not None and hasattr(module, "around"):
        text = config.text_config
        around: Family = module.around(family_of(text.model_type, text))
        return around
    variants: tuple[Family, ...] = getattr(module, "VARIANTS", None) or (module.FAMILY,)
    return next((variant for variant in variants if variant.fits(config)), variants[0])
