"""Whether a family's data is right: a tiny model with parts set to zero computes what a model without them does.

The same is tested for every family file; a family that was found by experiment has to show it before it is believed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunus import dims
from prunus.anatomy import stored_tensors
from prunus.architecture import AXES, Architecture
from prunus.errors import UnsupportedModel, one_line
from prunus.families._trace import is_norm
from prunus.families.family import Family

TOLERANCE = 2e-4
UNREACHABLE = -1e4
"""A router's logit of an expert that must not be chosen."""
TRIES = 4_000
"""How often a legal architecture is looked for."""
DRAWS = 4
"""Cuts that are tried where layers leave, which may be of several kinds."""
GROUPED = ("layers", "heads", "kv_heads", "experts", "top_k")
"""Axes whose parts are not chosen one by one."""


@dataclass(frozen=True)
class Choice:
    """What stays: layers, and of each other axis some indices, the same in all layers."""

    layers: list[int]
    axes: Mapping[str, Tensor]

    def index(self, unit: str, sizes: Architecture) -> Tensor | None:
        """What stays along a dimension; None keeps all."""
        return dims.index(unit, sizes, self.axes.get)


@dataclass(frozen=True)
class Trial:
    """A family, and a tiny model that it should describe, in float32 with random weights."""

    family: Family
    config: PreTrainedConfig
    model: PreTrainedModel
    tokens_BS: Tensor

    @functools.cached_property
    def layout(self) -> dict[str, tuple[str, ...]]:
        units = {name: self.family.units(name, value.shape) for name, value in stored_tensors(self.model).items()}
        return {name: each or () for name, each in units.items()}

    @functools.cached_property
    def sizes(self) -> Architecture:
        formulas = self.family.sizes(unit for units in self.layout.values() for unit in units)
        return self.family.architecture(self.config).only(formulas)

    def failures(self) -> dict[str, str]:
        """Axes whose cut does not compute what it should, each with what was seen. Each is cut by itself, or with what
        must be cut along."""
        able = [axis for axis in self.sizes.axes() if axis not in self.family.uncut]
        found = {axis: self._wrong({axis}) for axis in able}
        return {axis: wrong for axis, wrong in found.items() if wrong}

    def without(self, failed: Mapping[str, str]) -> Family:
        """The family with these axes fixed, after the others were cut together.

        Raises:
            UnsupportedModel: that fails, or too little is left.
        """
        fixed = {axis: f"a tiny model so cut does not compute what it should ({why})" for axis, why in failed.items()}
        family = dataclasses.replace(self.family, uncut={**self.family.uncut, **fixed})
        left = {axis for axis in self.sizes.axes() if axis not in family.uncut}
        if not {"ffn", "expert_ffn"} & left or len(left) < 2:
            raise UnsupportedModel(next(iter(failed.values()), "no neurons can be told"))
        if wrong := dataclasses.replace(self, family=family)._wrong(left):
            raise UnsupportedModel(wrong)
        return family

    def _wrong(self, axes: set[str]) -> str | None:
        """What is wrong with cuts of these axes; None if nothing is."""
        generators = map(random.Random, range(DRAWS if "layers" in axes else 1))
        return next(filter(None, (self._wrong_once(axes, generator) for generator in generators)), None)

    def _wrong_once(self, axes: set[str], generator: random.Random) -> str | None:
        target = self._target(axes, generator)
        if target is None:
            return None
        choice = _choice(self.sizes, target, generator)
        expected = _logits(self._masked(choice, target), self.tokens_BS)
        try:
            found = _logits(self._cut(choice, target), self.tokens_BS)
        except Exception as error:  # config classes and models raise what they like
            return f"cut to {target}, it does not run: {one_line(error, 150)}"
        gap = float((found - expected).norm() / expected.norm())
        return None if gap < TOLERANCE else f"cut to {target}, its logits differ by {gap:.0e}"

    def _target(self, axes: set[str], generator: random.Random) -> Architecture | None:
        """A legal architecture in which some of these axes are cut, and others only where they must be."""
        sizes = self.sizes
        joint = axes | ({"hidden", "heads", "kv_heads"} & (sizes.axes().keys() - self.family.uncut.keys()))
        for attempt in range(TRIES):
            able = [axis for axis in sorted(axes if attempt < TRIES // 2 else joint) if sizes[axis] > 1]
            drawn = {axis: generator.randint(max(1, sizes[axis] // 3), sizes[axis] - 1) for axis in able}
            target = sizes.replace(**drawn)
            if drawn.keys() & axes and not self.family.illegal(target) and _per_group(target) <= _per_group(sizes):
                return target
        return None

    def _masked(self, choice: Choice, target: Architecture) -> PreTrainedModel:
        """The whole model with everything else set to zero, and dropped experts out of reach."""
        config = copy.deepcopy(self.config)
        if "top_k" in target:
            setattr(config, self.family.fields["top_k"], target.top_k)
        masked = _model(config)
        values = {}
        for name, value in stored_tensors(self.model).items():
            layer, local = self.family.split(name)
            value = value.detach().clone()
            nothing = UNREACHABLE if local in self.family.buffers else 0.0
            for dim, unit in enumerate(self.layout[name]):
                if (index := choice.index(unit, self.sizes)) is not None:
                    gone = torch.ones(value.shape[dim], dtype=torch.bool).index_fill_(0, index, False)
                    value.index_fill_(dim, gone.nonzero().flatten(), nothing)
            stays = layer is None or layer in choice.layers
            values[name] = self._centred(name, value, choice) if stays else torch.zeros_like(value)
        masked.load_state_dict(values, strict=False)
        if "experts" in target and target.experts < self.sizes.experts:
            self._hide(masked, choice.axes["experts"])
        return masked

    def _centred(self, name: str, value: Tensor, choice: Choice) -> Tensor:
        """What writes to the stream with a mean of zero over the kept channels: a LayerNorm takes off the mean, which
        the dropped channels have a part in."""
        family, module = self.family, self.family.split(name)[1].rpartition(".")[0]
        outer = {each.rpartition(".")[0] for each in family.outer_weights} - {family.head, family.final_norm}
        if family.centred and module in outer | {branch.write for branch in family.branches}:
            for dim, unit in enumerate(self.layout[name]):
                if unit == "hidden":
                    kept = value.index_select(dim, choice.axes["hidden"])
                    value = value.index_copy(dim, choice.axes["hidden"], kept - kept.mean(dim, keepdim=True))
        return value

    def _hide(self, model: nn.Module, kept: Tensor) -> None:
        """Routers never choose an expert that leaves."""
        reads = [read for branch in self.family.branches if branch.experts for read in branch.reads]
        routers = {read for read in reads if self.family.outputs(read) == "experts"}
        gone = torch.ones(self.sizes.experts, dtype=torch.bool).index_fill_(0, kept, False).nonzero().flatten()
        for name, module in model.named_modules():
            if self.family.split(name)[1] in routers:
                module.forward = _blind(module.forward, gone)

    def _cut(self, choice: Choice, target: Architecture) -> PreTrainedModel:
        """The model without what leaves."""
        family = self.family
        values = family.cut_config(self.config.to_dict(), target, choice.layers)
        student = {}
        for name, value in stored_tensors(self.model).items():
            layer, local = family.split(name)
            if layer is None or layer in choice.layers:
                own = name if layer is None else f"{family.layer_prefix}{choice.layers.index(layer)}.{local}"
                student[own] = self._sliced(name, value.detach(), choice, target)
        cut = _model(type(self.config).from_dict(values))
        missing, unexpected = cut.load_state_dict(student, strict=False)
        lacking = [name for name in missing if name in stored_tensors(cut) and name not in cut.all_tied_weights_keys]
        if unexpected or lacking:
            raise UnsupportedModel(f"it has other tensors, such as {[*unexpected, *lacking][0]}")
        return cut

    def _sliced(self, name: str, value: Tensor, choice: Choice, target: Architecture) -> Tensor:
        """What stays of a tensor. Norms are corrected for channels that left, which were zero; and of an embedding that
        is scaled by √hidden what is written beside it shrinks alike."""
        family, whole = self.family, value.shape
        value = self._centred(name, value, choice)
        for dim, unit in enumerate(self.layout[name]):
            if (index := choice.index(unit, self.sizes)) is not None:
                value = value.index_select(dim, index)
        module = family.split(name)[1].removesuffix(".weight")
        shrunk = math.sqrt(target.hidden / self.sizes.hidden) if family.scaled_embedding else 1.0
        if name.removesuffix(".weight") in self._norms and value.shape != whole:
            behind = any(module == branch.post_norm for branch in family.branches)
            scale = math.sqrt(whole[0] / value.shape[0]) * (shrunk if behind else 1.0)
            return (value + family.norm_offset) * scale - family.norm_offset
        bare = any(module == branch.write and not branch.post_norm for branch in family.branches)
        return value * shrunk if bare else value

    @functools.cached_property
    def _norms(self) -> set[str]:
        return {name for name, module in self.model.named_modules() if is_norm(module)}


def _per_group(sizes: Architecture) -> int:
    """Query heads of a key-value group."""
    return sizes.heads // sizes.kv_heads if "heads" in sizes else 1


def _choice(sizes: Architecture, target: Architecture, generator: random.Random) -> Choice:
    def some(count: int, keep: int) -> list[int]:
        return sorted(generator.sample(range(count), keep))

    def grouped(groups: list[int], per_group: int, keep: int) -> list[int]:
        return [group * per_group + place for group in groups for place in some(per_group, keep)]

    chosen = {axis: some(sizes[axis], target[axis]) for axis in AXES if axis in sizes and axis not in GROUPED}
    if "heads" in sizes:
        chosen["kv_heads"] = some(sizes.kv_heads, target.kv_heads)
        chosen["heads"] = grouped(chosen["kv_heads"], _per_group(sizes), _per_group(target))
    if "experts" in sizes:
        groups = sizes.get("expert_groups", 1)
        chosen["experts"] = grouped(list(range(groups)), sizes.experts // groups, target.experts // groups)
    return Choice(some(sizes.layers, target.layers), {axis: torch.tensor(kept) for axis, kept in chosen.items()})


def _blind(forward: Any, gone: Tensor) -> Any:
    """A router's forward that sees logits without these experts."""

    class Unreachable(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            return found.index_fill(-1, gone, UNREACHABLE) if function is F.linear else found

    def blind(*args: Any, **kwargs: Any) -> Any:
        with Unreachable():
            return forward(*args, **kwargs)

    return blind


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens_BS, use_cache=False).logits
    return logits
