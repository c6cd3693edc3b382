"""What a tiny model shows when it is run and saved, beside the branches of its layers.

Shapes: N rows, H channels of the residual stream; B blocks, S tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from prunus.anatomy import stored_tensors
from prunus.errors import UnsupportedModel
from prunus.families import _probes
from prunus.families._probes import BASE
from prunus.families._tiny import Tiny
from prunus.families.family import Branch
from prunus.head import head_of

DOCUMENT = 10
"""Tokens of a document."""


@torch.no_grad()
def check_causal(tiny: Tiny, tokens_BS: Tensor) -> None:
    """A model that reads both ways learns from text to look at what it should predict.

    Raises:
        UnsupportedModel: a token changes what comes before it.
    """
    other_BS = tokens_BS.clone()
    other_BS[:, -1] = tokens_BS[:, -1] % 50 + 10
    before, after = (
        tiny.body(input_ids=each, use_cache=False).last_hidden_state[:, :-1] for each in (tokens_BS, other_BS)
    )
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
        raise UnsupportedModel("it reads text in both directions")


@torch.no_grad()
def check_head(tiny: Tiny, tokens_BS: Tensor) -> None:
    """What is distilled comes from the last states by a head that is known (see `head.head_of`).

    Raises:
        UnsupportedModel: the model makes other logits of them.
    """
    states_BSH = tiny.body(input_ids=tokens_BS, use_cache=False).last_hidden_state
    logits_BSV = tiny.model(input_ids=tokens_BS, use_cache=False).logits
    if not torch.allclose(head_of(tiny.model).logits(states_BSH), logits_BSV.float(), rtol=1e-3, atol=1e-4):
        raise UnsupportedModel("its logits are not what its output head makes of the last states")


def seen(
    config: PreTrainedConfig, tiny: Tiny, branches: tuple[Branch, ...], stream_BSH: Tensor, tokens_BS: Tensor
) -> dict[str, Any]:
    """What a run shows of a family, beside its weights."""
    around = tiny.norms(inside=False)
    if len(around) != 1:
        raise UnsupportedModel(f"outside its layers there are {len(around)} norms, where one is known how to read")
    offset, centred, weighs = _norm_kind(tiny.model.get_submodule(around[0]), BASE["hidden"])
    embedding: Any = tiny.model.get_input_embeddings()
    parameters = dict(tiny.model.named_parameters()).keys()
    return {
        "model_type": config.model_type,
        "branches": branches,
        "final_norm": around[0],
        "embedding": _name_of(tiny.model, embedding),
        "head": _name_of(tiny.model, tiny.model.get_output_embeddings()),
        "layer_prefix": tiny.prefix,
        "norm_offset": offset,
        "centred": centred,
        "uncut": {} if weighs else {"hidden": "its norms have no weight to make up for channels that leave"},
        "transposed": any(isinstance(module, Conv1D) for module in tiny.layers.modules()),
        "scaled_embedding": _is_scaled(embedding.weight[tokens_BS], stream_BSH),
        "per_layer_fields": _probes.per_layer_fields(config),
        "layer_count_fields": tuple(k for k in _probes.LAYER_COUNTS if isinstance(getattr(config, k, None), int)),
        "other_fields": _probes.other_fields(config),
        "buffers": tuple(sorted({tiny.split(name)[1] for name in stored_tensors(tiny.model).keys() - parameters})),
        "ignores_positions": _ignores_positions(tiny),
    }


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    found = next((name for name, module in model.named_modules() if module is wanted), None)
    if found is None:
        raise UnsupportedModel("it has no embedding, or no output head, that transformers knows")
    return found


@torch.no_grad()
def _norm_kind(norm: nn.Module, width: int) -> tuple[float, bool, bool]:
    """What is added to its weight, whether it takes off the mean, and whether it has a weight."""
    x_NH = torch.randn(5, width)
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    out_NH = norm(x_NH) - (0.0 if bias is None else bias)
    weight_H = torch.ones(width) if weight is None else weight
    centred_NH = x_NH - x_NH.mean(-1, keepdim=True)
    for offset, given_NH, takes in ((0.0, x_NH, False), (1.0, x_NH, False), (0.0, centred_NH, True)):
        normed_NH = given_NH / given_NH.square().mean(-1, keepdim=True).sqrt()
        if torch.allclose(out_NH, normed_NH * (weight_H + offset), rtol=1e-3, atol=1e-4):
            return offset, takes, weight is not None
    raise UnsupportedModel(f"{type(norm).__name__} norms otherwise than by a root mean square")


def _is_scaled(embedded_BSH: Tensor, stream_BSH: Tensor) -> bool:
    root = BASE["hidden"] ** 0.5
    return embedded_BSH.shape == stream_BSH.shape and torch.allclose(stream_BSH, embedded_BSH * root, rtol=1e-3)


@torch.no_grad()
def _ignores_positions(tiny: Tiny) -> bool:
    """Whether documents in one block read each other, though their positions start anew."""
    tokens_1S = torch.randint(3, BASE["vocab"], (1, 2 * DOCUMENT))
    positions_1S = torch.arange(DOCUMENT).repeat(2)[None]
    packed, alone = (
        tiny.body(input_ids=tokens_1S[:, some], position_ids=positions_1S[:, some], use_cache=False).last_hidden_state
        for some in (slice(None), slice(DOCUMENT, None))
    )
    return not torch.allclose(packed[:, DOCUMENT:], alone, rtol=1e-3, atol=1e-4)


def stored_names(tiny: Tiny) -> tuple[tuple[tuple[str, str], ...], dict[str, tuple[str, ...]]]:
    """How names in a checkpoint differ from the model's: `stored_prefixes` and `stored_as` of a family."""
    files = _saved(tiny.model)
    prefixes: dict[str, str] = {}
    stored_as: dict[str, tuple[str, ...]] = {}
    for name, value in stored_tensors(tiny.model).items():
        if name in files:
            continue
        layer, local = tiny.split(name)
        other = next((n for n, v in files.items() if v.shape == value.shape and torch.equal(v, value)), None)
        tail = ".".join(name.split(".")[-2:]) if layer is None else f"{layer}.{local}"
        if other is not None and other.endswith(f".{tail}"):
            prefixes[name.removesuffix(tail)] = other.removesuffix(tail)
            continue
        if other is not None:
            names: tuple[str, ...] = (other if layer is None else other.partition(f".{layer}.")[2],)
        elif layer is not None and value.ndim == 3:
            names = _apart(files, f"{tiny.prefix}{layer}.", value[0])
        else:
            raise UnsupportedModel(f"a checkpoint holds {name} in another form")
        if stored_as.setdefault(local, names) != names:
            raise UnsupportedModel(f"{name} is stored otherwise than in other layers")
    return tuple(sorted(prefixes.items(), key=lambda pair: -len(pair[0]))), stored_as


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """What transformers writes of a model."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _apart(files: Mapping[str, Tensor], prefix: str, expert: Tensor) -> tuple[str, ...]:
    """Patterns of the names under which the rows of a layer's first expert lie."""

    def holder(rows: Tensor) -> str | None:
        same = (n for n, v in files.items() if n.startswith(prefix) and v.shape == rows.shape and torch.equal(v, rows))
        return next(same, None)

    for count in (1, 2):
        names = [holder(rows) for rows in expert.chunk(count)]
        if all(names):
            return tuple(str(name).removeprefix(prefix).replace(".0.", ".*.", 1) for name in names)
    raise UnsupportedModel("a checkpoint holds its experts in a way that is not known")
