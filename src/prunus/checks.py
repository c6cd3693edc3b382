"""What a checkpoint must be before anything is cut out of it; each check says what is wrong and what to do.

`name` is what the user called the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from prunus import dims, weights
from prunus.architecture import Architecture
from prunus.errors import BadCheckpoint, UnsupportedModel
from prunus.families import Family, known_families

DEQUANTISE = (
    "Prunus cuts weights in full precision: start from the model that this one was quantised from, or convert it once "
    "(transformers: from_pretrained(...).dequantize(), then save_pretrained), or give its GGUF file."
)


def readable(name: str, raw: Mapping[str, Any]) -> None:
    """Refuse what a config says of weights that are no plain numbers, and of code that comes with them."""
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "a method that it does not name")
        raise UnsupportedModel(f"{name}: its weights are quantised ({method}). {DEQUANTISE}")
    model_type = raw.get("model_type", "")
    if raw.get("auto_map") and model_type not in known_families():
        raise UnsupportedModel(
            f"{name}: model type {model_type!r} comes with its own code ({', '.join(sorted(raw['auto_map']))}), which "
            "Prunus does not run. If transformers itself has this architecture, convert the weights to it first."
        )


def variant(name: str, family: Family, config: PreTrainedConfig) -> None:
    """Refuse a model whose layers compute something else than its family file says."""
    for key, value in family.requires.items():
        if (found := getattr(config, key, value)) != value:
            raise UnsupportedModel(
                f"{name}: {key} is {found} in config.json; of {family.model_type} only models with {value} are "
                "supported, because the others read the residual stream otherwise"
            )


def tied(name: str, family: Family, files: Mapping[str, Path]) -> None:
    """A head that config.json calls tied and that is stored all the same must be the embedding."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if head not in files or embedding not in files:
        return
    mine, other = (weights.stored(files[name], family.stored_as.get(name, name)) for name in (head, embedding))
    same = mine.shape == other.shape and all(map(torch.equal, mine.read(), other.read()))
    if not same:
        raise BadCheckpoint(
            f"{name}: config.json says that {head} is tied to {embedding}, but the two differ; transformers would drop "
            f'{head}. Set "tie_word_embeddings": false if the head is right, or remove it from the file.'
        )


def rules(name: str, family: Family, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor is covered by a rule and has the shape that the config says."""
    uncovered = [tensor for tensor in shapes if family.units(tensor) is None]
    if uncovered:
        raise UnsupportedModel(
            f"{name}: the family {family.model_type!r} has no rule for {len(uncovered)} tensors, such as "
            f"{uncovered[0]!r}. This is a variant that Prunus does not know; cutting it would damage it silently."
        )
    wrong = {
        tensor: shape
        for tensor, shape in shapes.items()
        if shape != tuple(dims.size(unit, architecture) for unit in family.units(tensor) or ())
    }
    if wrong:
        tensor, shape = next(iter(wrong.items()))
        raise BadCheckpoint(f"{name}: {tensor} has shape {list(shape)}, which config.json ({architecture}) contradicts")


def complete(name: str, family: Family, architecture: Architecture, tensors: Iterable[str], *, tied: bool) -> None:
    """No tensor is missing, which transformers would fill with random numbers, and none is of a layer too many."""
    present = set(tensors)
    in_layers = {local for layer, local in map(family.split, present) if layer is not None}
    wanted = {
        f"{family.layer_prefix}{layer}.{local}"
        for layer in range(architecture.layers)
        for local in in_layers.union(family.layer_weights)  # a bias that one layer has, all have
    }
    wanted |= set(family.outer_weights) - ({f"{family.head}.weight"} if tied else set())
    if absent := sorted(wanted - present):
        raise BadCheckpoint(
            f"{name}: the checkpoint is incomplete, it lacks {absent[0]}"
            + (f" and {len(absent) - 1} more tensors" if len(absent) > 1 else "")
            + ", which config.json calls for; download it again"
        )
    if beyond := sorted(tensor for tensor in present - wanted if family.split(tensor)[0] is not None):
        raise BadCheckpoint(f"{name}: config.json says {architecture.layers} layers, but there is {beyond[0]}")
