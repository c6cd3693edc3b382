"""What a checkpoint must be before anything is cut out of it; each check says what is wrong and what to do.

`name` is what the user called the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from prunus import dims
from prunus.anatomy import stored_tensors
from prunus.architecture import Architecture
from prunus.errors import BadCheckpoint, UnsupportedModel, one_line
from prunus.families import Family, may_be_known
from prunus.storage import Stored

DEQUANTISE = (
    "Prunus cuts weights in full precision: start from the model that this one was quantised from, or convert it once "
    "(transformers: from_pretrained(...).dequantize(), then save_pretrained), or give its GGUF file."
)

DAMAGED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, OSError)
"""What config classes and models raise of values that they were not made for, beside an error of its own."""


@contextlib.contextmanager
def valid_config(name: str) -> Iterator[None]:
    """What fails inside, fails by what config.json says."""
    try:
        yield
    except (*DAMAGED, StrictDataclassError) as error:
        what = f"{type(error).__name__}: {one_line(error, 1000)}"
        raise BadCheckpoint(f"{name}: config.json is not a valid config ({what})") from error


def readable(name: str, raw: Mapping[str, Any]) -> None:
    """Refuse what a config says of weights that are no plain numbers, and of code that comes with them."""
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "a method that it does not name")
        raise UnsupportedModel(f"{name}: its weights are quantised ({method}). {DEQUANTISE}")
    model_type = raw.get("model_type", "")
    if raw.get("auto_map") and not may_be_known(model_type):
        raise UnsupportedModel(
            f"{name}: model type {model_type!r} comes with its own code ({', '.join(sorted(raw['auto_map']))}), which "
            "Prunus does not run. If transformers itself has this architecture, convert the weights to it first."
        )


def variant(name: str, family: Family, config: PreTrainedConfig) -> None:
    """Refuse a model whose layers compute something else than its family file says."""
    for key, value in family.requires.items():
        found = getattr(family.text(config), key, value)
        if found != value and (found or value):  # not set is not true
            raise UnsupportedModel(
                f"{name}: {key} is {found} in config.json; of {family.model_type} only models with {value} are "
                "supported, because the others read the residual stream otherwise"
            )


def rules(name: str, family: Family, architecture: Architecture, stored: Mapping[str, Stored]) -> None:
    """Every tensor is covered by a rule and has the shape that the config says."""
    uncovered = [tensor for tensor, found in stored.items() if family.units(tensor, found.shape) is None]
    if uncovered:
        raise UnsupportedModel(
            f"{name}: the family {family.model_type!r} has no rule for {len(uncovered)} tensors, such as "
            f"{uncovered[0]!r}. This is a variant that Prunus does not know; cutting it would damage it silently."
        )
    wrong = {
        tensor: found.shape
        for tensor, found in stored.items()
        if found.shape != tuple(dims.size(unit, architecture) for unit in family.units(tensor, found.shape) or ())
    }
    if wrong:
        tensor, shape = next(iter(wrong.items()))
        raise BadCheckpoint(f"{name}: {tensor} has shape {list(shape)}, which config.json ({architecture}) contradicts")


def complete(name: str, skeleton: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
    """No tensor is missing, which transformers would fill with random numbers, and none is left over.

    Args:
        skeleton: what transformers builds from the config.
    """
    wanted = stored_tensors(skeleton).keys()
    if absent := sorted(wanted - stored.keys()):
        raise BadCheckpoint(
            f"{name}: the checkpoint is incomplete, it lacks {absent[0]}"
            + (f" and {len(absent) - 1} more tensors" if len(absent) > 1 else "")
            + ", which config.json calls for; download it again"
        )
    if beyond := sorted(stored.keys() - wanted):
        raise BadCheckpoint(
            f"{name}: there is {beyond[0]}, which is no part of the model that config.json describes; one of the two "
            "is of another model"
        )
