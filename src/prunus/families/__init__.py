"""One file per Hugging Face `model_type`; the file's name is the type, its `FAMILY` the data. Of a model with a decoder
of any family, `around` makes the data from the decoder's."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from prunus.errors import UnsupportedModel
from prunus.families._decilm import DeciLMConfig, DeciLMForCausalLM
from prunus.families._inferred import infer
from prunus.families._uneven import with_uneven_layers
from prunus.families.family import Branch, Family

__all__ = ["Branch", "Family", "family_of", "known_families", "may_be_known", "variants_of", "with_uneven_layers"]

OF_OTHER_NAME = {"nemotron_nas": DeciLMConfig.model_type}
"""File → the type that it describes, where a file cannot be called so."""
# transformers has no code for this type of its own.
AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig)
AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM)


@functools.cache
def known_families() -> tuple[str, ...]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        sorted(OF_OTHER_NAME.get(name, name) for name in names if not name.startswith("_") and name != "family")
    )


def may_be_known(model_type: str) -> bool:
    """Whether a file describes a type, or transformers has code for it that can be asked."""
    return model_type in known_families() or model_type in CONFIG_MAPPING


def family_of(model_type: str, config: Any = None) -> Family:
    """The family of a model type.

    Args:
        config: which of several variants is meant; the first one where none or no other fits. Of a type that no file
            describes, what its family is made from by experiment (see `_inferred`).
    Raises:
        UnsupportedModel: no file describes it, and experiments do not show enough. Never treated as "probably Llama".
    """
    if model_type not in known_families() and isinstance(config, PreTrainedConfig):
        return infer(config)
    if model_type not in known_families():
        raise UnsupportedModel(
            f"model type {model_type!r} is not supported, because no family file says which of its weights carry which "
            f"axis. Known: {', '.join(known_families())}."
        )
    module = _module(model_type)
    if config is not None and hasattr(module, "around"):
        text = config.text_config
        around: Family = module.around(family_of(text.model_type, text))
        return around
    variants = variants_of(model_type)
    return next((variant for variant in variants if variant.fits(config)), variants[0])


def variants_of(model_type: str) -> tuple[Family, ...]:
    """All that a file describes of its type: what options of the config make of it."""
    module = _module(model_type)
    return getattr(module, "VARIANTS", None) or (module.FAMILY,)


def _module(model_type: str) -> ModuleType:
    file = next((file for file, other in OF_OTHER_NAME.items() if other == model_type), model_type)
    return importlib.import_module(f"prunus.families.{file}")
