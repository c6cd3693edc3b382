"""The sizes of a model as plain data, and the way to and from a Hugging Face config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prunus.errors import BadRecipe

AXES = ("layers", "hidden", "ffn", "heads", "kv_heads")
"""What can be cut. `head_dim` and `vocab` are sizes, but not axes of a cut."""


class Architecture(Mapping[str, int]):
    """Sizes of a decoder by name; also as attributes. Equal and hashed by its sizes.

    layers, hidden (channels of the residual stream), ffn (neurons of a feed-forward block), heads, kv_heads (of a
    layer), head_dim and vocab; and what a family adds, see its `fields`. head_dim is always explicit: runtimes that
    derive it break on pruned models.
    """

    def __init__(self, **sizes: int) -> None:
        self._sizes = sizes

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or name not in self._sizes:
            raise AttributeError(f"an architecture without {name!r}")
        return self._sizes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __hash__(self) -> int:
        return hash(frozenset(self._sizes.items()))

    def replace(self, **sizes: int) -> Architecture:
        return Architecture(**self._sizes | sizes)

    def axes(self) -> dict[str, int]:
        return {axis: self[axis] for axis in AXES if axis in self}

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.axes().items())


def from_config(config: Mapping[str, Any], fields: Mapping[str, str]) -> Architecture:
    """Read the sizes from a config; `fields` names the config's key for each size.

    Configs written before head_dim was explicit mean hidden / heads.
    """
    sizes = {size: int(config[key]) for size, key in fields.items() if config.get(key) is not None}
    return Architecture(**{"head_dim": sizes["hidden"] // sizes["heads"]} | sizes)


def to_config(
    config: Mapping[str, Any],
    target: Architecture,
    *,
    fields: Mapping[str, str],
    kept_layers: Sequence[int],
    per_layer_fields: Iterable[str] = (),
    layer_count_fields: Iterable[str] = (),
) -> dict[str, Any]:
    """The config of the cut model.

    Args:
        config: the teacher's config as a dict.
        target: sizes after the cut.
        fields: config key of each size.
        kept_layers: ascending indices of the teacher's layers that stay.
        per_layer_fields: keys that hold one entry per layer; entries of removed layers are dropped.
        layer_count_fields: keys that hold "the first n layers"; n is recounted among the kept layers.
    """
    cut = dict(config)
    cut |= {key: target[size] for size, key in fields.items() if size in target}
    for key in per_layer_fields:
        if cut.get(key) is not None:
            cut[key] = [config[key][i] for i in kept_layers]
    for key in layer_count_fields:
        if cut.get(key) is not None:
            cut[key] = sum(i < config[key] for i in kept_layers)
    return cut


def parse(text: str, teacher: Architecture) -> Architecture:
    """`hidden=512,ffn=1024` → the teacher with those sizes replaced.

    Raises:
        BadRecipe: unknown axis (with a suggestion), not a whole number, or larger than the teacher; all at once.
    """
    mistakes, sizes = [], {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, value = (piece.strip() for piece in part.partition("="))
        if axis not in AXES:
            close = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"axes: {', '.join(AXES)}"
            mistakes.append(f"arch: unknown axis {axis!r}; {hint}")
        elif not value.isdigit() or int(value) < 1:
            mistakes.append(f"arch: {axis} must be a whole number of at least 1, not {value!r}")
        elif int(value) > teacher[axis]:
            mistakes.append(f"arch: {axis}={value} is larger than the teacher's {teacher[axis]}; pruning only removes")
        else:
            sizes[axis] = int(value)
    if mistakes:
        raise BadRecipe("\n".join(mistakes))
    return teacher.replace(**sizes)
