"""Walk a model layer by layer: all calibration text through one layer before the next.

A layer's weights are touched once per walk, only one layer's statistics are alive at a time, and variants of a model
that share a prefix share its computation. Measuring, leave-one-out and repair are all walks.

Shapes: B blocks in a batch, S tokens in a block, H channels of the residual stream.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunus import hardware
from prunus.anatomy import body_of, layers_of
from prunus.errors import BadCheckpoint
from prunus.families import Branch, Family
from prunus.frozen import is_frozen


class TokenBlocks(Protocol):
    """What a walk needs of `text.Blocks`."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]: ...


@dataclass
class Batch:
    """Some blocks on their way through the layers.

    Attributes:
        stream_BSH: the residual stream before the next layer.
        layer_inputs: keyword arguments of each layer (mask, positions, rotary tables).
    """

    stream_BSH: Tensor
    layer_inputs: list[dict[str, Any]]


class _Reached(Exception):
    pass


class Returned(Tensor):
    """What a layer returns, whether the model takes it as it is, as the first of a tuple, or of a pair."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))

    def __getitem__(self, index: Any) -> Tensor:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what the layer would have been called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.signature = inspect.signature(layer.forward)
        self.stream_BSH: Tensor | None = None
        self.inputs: dict[str, Any] = {}
        # Some models ask a layer for its kind before they call it.
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str | int | bool)}
        self.__dict__.update({name: value for name, value in plain.items() if not name.startswith("_")})

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        called = self.signature.bind(*args, **inputs).arguments
        called |= called.pop("kwargs", {})
        (_, stream_BSH), *others = called.items()
        self.stream_BSH, self.inputs = stream_BSH.as_subclass(Tensor), dict(others)
        return stream_BSH.as_subclass(Returned)


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile layer by layer: they share one compilation, which a whole model would not. Frozen ones stay as
    they are: torch.compile cannot read their weights, and would gain no more than they have."""
    if not is_frozen(model):
        for layer in layers_of(model):
            layer.compile()


@contextlib.contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[_Recorder]]:
    """Inside, recorders stand in for the layers."""
    layers = layers_of(model)
    own = dict(layers._modules)
    recorders = [_Recorder(layer) for layer in layers]
    layers._modules.update(zip(own, recorders, strict=True))
    try:
        yield recorders
    finally:
        layers._modules.update(own)


def enter(model: PreTrainedModel, tokens_BS: Tensor, positions_BS: Tensor) -> Batch:
    """The residual stream before layer 0, and what each layer will be called with.

    The model's own forward runs with its layers replaced by recorders; so masks and rotary tables are made by the
    model's own code, whatever the family.
    """
    with _recorded(model) as recorders:
        body_of(model)(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
    stream_BSH = recorders[0].stream_BSH
    assert stream_BSH is not None
    return Batch(stream_BSH, [recorder.inputs for recorder in recorders])


def enter_all(
    model: PreTrainedModel, blocks: TokenBlocks, *, batch_blocks: int, places: range | None = None
) -> list[Batch]:
    """`enter` with the blocks of these places (default: all), so many at a time."""
    device = next(body_of(model).parameters()).device
    places = range(len(blocks)) if places is None else places
    batches = (blocks.batch(list(places[at : at + batch_blocks])) for at in range(0, len(places), batch_blocks))
    return [enter(model, tokens.to(device), positions.to(device)) for tokens, positions in batches]


def run_layer(layer: nn.Module, stream_BSH: Tensor, inputs: dict[str, Any]) -> Tensor:
    output = layer(stream_BSH, **inputs)
    return output[0] if isinstance(output, tuple) else output


def check_finite(values: Tensor, what: str) -> None:
    """Raises BadCheckpoint if some are not numbers: scores made from them would be chance."""
    if not values.isfinite().all():
        raise BadCheckpoint(
            f"{what} on this text is NaN or infinite. float16 ends at 65,504: save a model that needs more in bfloat16 "
            "or float32. One that is in these already is damaged."
        )


def has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a module of this name, relative to the layer."""
    return any(name == found for found, _ in layer.named_modules())


def branches_of(layer: nn.Module, family: Family) -> list[Branch]:
    """The branches that a layer has, in their order."""
    return [branch for branch in family.branches if has(layer, branch.mark)]


def norm_of(layer: nn.Module, branch: Branch) -> nn.Module:
    """What the branch reads the stream through."""
    return layer.get_submodule(branch.norm) if branch.norm else nn.Identity()


def branch_inner(layer: nn.Module, branch: Branch, normed_BSH: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What a branch hands to its write projection (see `families.family`); the projection itself does not run."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    assert branch.write, f"{branch.name} has no write projection"
    handle = layer.get_submodule(branch.write).register_forward_pre_hook(stop)
    try:
        _call(layer, branch, normed_BSH, inputs)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError(f"{branch.write} was not called")


def branch_output(layer: nn.Module, branch: Branch, normed_BSH: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What a branch makes of its norm's output, before the post-norm if there is one."""
    output = _call(layer, branch, normed_BSH, inputs)
    return output[0] if isinstance(output, tuple) else output


def behind(layer: nn.Module, branch: Branch, written_BSH: Tensor) -> Tensor:
    """What is added to the stream: the same, or that behind the post-norm."""
    return layer.get_submodule(branch.post_norm)(written_BSH) if branch.post_norm else written_BSH


def added_scale(config: PreTrainedConfig, family: Family, branch: Branch) -> float:
    """Factor on what a branch adds to the stream, outside its module."""
    keys = filter(None, (family.residual_scale, branch.write_scale))
    return math.prod(getattr(family.text(config), key) for key in keys)


def module_scale(layer: nn.Module, branch: Branch) -> float:
    """Factor that a branch's module puts on the output of its write projection."""
    return float(getattr(layer.get_submodule(branch.module), branch.module_scale)) if branch.module_scale else 1.0


def _call(layer: nn.Module, branch: Branch, normed_BSH: Tensor, inputs: dict[str, Any]) -> Any:
    if branch.activation:
        (read,), write = branch.reads, layer.get_submodule(str(branch.write))
        return write(getattr(layer, branch.activation)(layer.get_submodule(read)(normed_BSH)))
    module = layer.get_submodule(branch.module)
    if branch.read_scale:
        normed_BSH = normed_BSH * getattr(module.config, branch.read_scale)
    return module(hidden_states=normed_BSH, **inputs) if branch.inner == "heads" else module(normed_BSH)


@contextlib.contextmanager
def observe(layer: nn.Module, observers: Mapping[str, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Call `observers[module](input, output)` whenever that module of the layer has run."""
    with contextlib.ExitStack() as stack:
        for module, observer in observers.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, see: Any = observer) -> None:
                see(args[0], output)

            stack.callback(layer.get_submodule(module).register_forward_hook(hook).remove)
        yield


def weight_of(projection: Any) -> Tensor:
    """[O, K] of a linear map: nn.Linear, a router, or GPT-2's Conv1D."""
    weight: Tensor = projection.weight
    return weight.T if isinstance(projection, Conv1D) else weight


@torch.no_grad()
def gram(x_ND: Tensor, *, column_blocks: int = 4) -> Tensor:
    """xᵀx as float32 [D, D]. Computed as an upper block triangle (5/8 of the work) and mirrored."""
    width = -(-x_ND.shape[1] // column_blocks)
    result = torch.empty(x_ND.shape[1], x_ND.shape[1], dtype=torch.float32, device=x_ND.device)
    for start in range(0, x_ND.shape[1], width):
        stop = min(start + width, x_ND.shape[1])
        part = hardware.matmul_float32(x_ND[:, start:stop].T, x_ND[:, start:])
        result[start:stop, start:] = part
        result[start:, start:stop] = part.T
    return result
