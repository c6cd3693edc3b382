"""A tiny model of a type, with random weights, that experiments are made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunus.anatomy import body_of, layers_of, stored_tensors
from prunus.errors import UnsupportedModel, one_line
from prunus.families import _probes, _trace
from prunus.families._probes import Probe

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a type, and where its parts are.

    Attributes:
        tied: hidden is always heads × head_dim.
        prefix: what names of its layers begin with.
    """

    config: PreTrainedConfig
    probes: Sequence[Probe]
    tied: bool
    model: PreTrainedModel
    layers: nn.ModuleList
    prefix: str

    @property
    def body(self) -> PreTrainedModel:
        return body_of(self.model)

    def split(self, name: str) -> tuple[int | None, str]:
        """See `Family.split`."""
        if not name.startswith(self.prefix):
            return None, name
        index, _, rest = name.removeprefix(self.prefix).partition(".")
        return (int(index), rest) if index.isdigit() else (None, name)

    def norms(self, *, inside: bool) -> list[str]:
        """Names of the norms in the layers, relative to them, or of those around."""
        named = [(self.split(name), module) for name, module in self.model.named_modules()]
        mine = [local for (layer, local), module in named if (layer is not None) == inside and _trace.is_norm(module)]
        return list(dict.fromkeys(mine))


def built(config: PreTrainedConfig, *, tied: bool) -> Tiny:
    """A tiny model of the same options.

    Raises:
        UnsupportedModel: none can be built, or transformers does not know its parts.
    """
    probes = _probes.probes(config, tied=tied)
    small = _probes.tiny(config, probes[0].sizes)
    model = random_model(small)
    try:
        layers = layers_of(model)
    except (AttributeError, StopIteration) as error:
        raise UnsupportedModel("it has no list of decoder layers") from error
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return Tiny(small, probes, tied, model, layers, f"{prefix}.")


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose activations are of the order of 1, so that no error hides under a norm's epsilon."""
    for key in EPSILONS:
        if getattr(config, key, None) is not None:
            setattr(config, key, 1e-10)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever its code runs into
        raise UnsupportedModel(f"it is not built in tiny sizes ({one_line(error)})") from error
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for value in stored_tensors(model).values():
            if not value.is_floating_point():
                raise UnsupportedModel("it stores tensors of whole numbers")
            if value.ndim < 2:
                value.add_(torch.randn_like(value) * 0.2)
            else:
                scale = 1.0 if id(value) in embeddings else value.shape[-1] ** -0.5
                value.copy_(torch.randn_like(value) * scale)
    return model.eval()
