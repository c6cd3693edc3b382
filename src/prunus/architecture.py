"""The sizes of a model as plain data, and the way to and from a Hugging Face config."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prunus.errors import BadRecipe

AXES = ("layers", "hidden", "ffn", "heads", "kv_heads")
"""What can be cut. `head_dim` and `vocab` are sizes, but not axes of a cut."""


@dataclasses.dataclass(frozen=True, order=True)
class Architecture:
    """Sizes of a decoder whose layers all have the same shape.

    Attributes:
        layers: decoder layers.
        hidden: channels of the residual stream.
        ffn: neurons of each feed-forward block.
        heads: query heads of each layer.
        kv_heads: key-value groups of each layer; divides `heads`.
        head_dim: channels per head. Always explicit: runtimes that derive it break on pruned models.
        vocab: rows of the embedding.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def size(self, unit: str) -> int:
        """Length of a weight dimension tagged `unit` (see `families.family.UNITS`)."""
        if unit in ("heads", "kv_heads"):
            return getattr(self, unit) * self.head_dim
        return getattr(self, unit)

    def replace(self, **sizes: int) -> Architecture:
        return dataclasses.replace(self, **sizes)

    def axes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

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
    cut |= {key: getattr(target, size) for size, key in fields.items()}
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
        elif int(value) > getattr(teacher, axis):
            mistakes.append(
                f"arch: {axis}={value} is larger than the teacher's {getattr(teacher, axis)}; pruning only removes"
            )
        else:
            sizes[axis] = int(value)
    if mistakes:
        raise BadRecipe("\n".join(mistakes))
    return teacher.replace(**sizes)
