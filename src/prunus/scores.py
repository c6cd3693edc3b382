"""Scores: axis → float32, with provenance; safetensors on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunus.errors import BadCheckpoint
from prunus.files import atomic_file, save_file


@dataclass(frozen=True)
class Scores:
    """How much each part of the teacher matters. Higher stays longer; comparable within a row only.

    Attributes:
        axes: "layers" [L], "hidden" [H], "expert_ffn" [L, E, F], the others that the model has [L, C]; float32. A
            layer that lacks what is scored has zeros.
        energies: norm → E[(x/rms)²] of the channels at its input, [L, H] inside the layers, [H] outside. The norm
            correction needs them.
        provenance: teacher, text, tokens and the function behind each axis.
    """

    axes: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    provenance: Mapping[str, str]

    def __getitem__(self, axis: str) -> Tensor:
        return self.axes[axis]

    def energy(self, norm: str, layer: int | None) -> Tensor | None:
        """float32 [H] at the input of a norm, or None if the module is not one that reads the hidden channels."""
        energy = self.energies.get(norm)
        return energy if energy is None or layer is None else energy[layer]


def save_tensors(groups: Mapping[str, Mapping[str, Tensor]], provenance: Mapping[str, str], to: Path) -> None:
    """Named groups of tensors and their provenance in one safetensors file, atomically."""
    flat = {f"{group}/{name}": value.contiguous() for group, values in groups.items() for name, value in values.items()}
    with atomic_file(to) as partial:
        save_file(flat, partial, metadata={"provenance": json.dumps(dict(provenance))})


def load_tensors(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Inverse of `save_tensors`. Raises BadCheckpoint if the file is damaged."""
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = stream.get_tensor(key)
            provenance = json.loads(stream.metadata()["provenance"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{file}: not a file of Prunus, or damaged ({error}); delete it and run again") from error
    return groups, provenance


def save_scores(scores: Scores, to: Path) -> None:
    save_tensors({"axis": scores.axes, "energy": scores.energies}, scores.provenance, to)


def load_scores(file: Path) -> Scores:
    groups, provenance = load_tensors(file)
    return Scores(groups["axis"], groups["energy"], provenance)
