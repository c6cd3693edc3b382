"""What a model is made of: its axes and where its parameters sit."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunus.architecture import AXES
from prunus.checkpoint import Checkpoint
from prunus.results import model_facts
from prunus.selection import illegal_cut


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, costs and, per axis, the next smaller legal size."""
    return model_facts(checkpoint) | {
        "next_smaller": {axis: next_smaller(checkpoint, axis) for axis in checkpoint.architecture.axes()}
    }


def next_smaller(checkpoint: Checkpoint, axis: str) -> int | None:
    """The largest legal size of an axis below the present one, the others as they are; None if there is none.

    A key-value group leaves with its query heads.
    """
    sizes = checkpoint.architecture
    for size in range(sizes[axis] - 1, 0, -1):
        changes = {axis: size}
        if axis == "kv_heads":
            changes["heads"] = size * sizes.heads // sizes.kv_heads
        if not illegal_cut(checkpoint.family, sizes, sizes.replace(**changes)):
            return size
    return None


def show(checkpoint: Checkpoint) -> None:
    """Print the tables for a reader."""
    found, console = facts(checkpoint), Console(highlight=False)
    console.print(
        f"[bold]{escape(checkpoint.name)}[/bold]  {found['model_type']}, {checkpoint.parameters:,} parameters, "
        f"{checkpoint.bytes / 1e6:,.0f} MB, {str(checkpoint.dtype).removeprefix('torch.')}"
    )
    axes = Table("axis", "size", "next legal size", "meaning", box=None, header_style="bold")
    for axis in checkpoint.architecture.axes():
        smaller = found["next_smaller"][axis]
        size = str(checkpoint.architecture[axis])
        fixed = checkpoint.family.uncut.get(axis)
        meaning = f"cannot be cut: {fixed}" if fixed else AXES[axis]
        if axis == "layers" and checkpoint.family.folding:
            meaning = "branches: attention and FFN of a layer are one each"
        axes.add_row(axis, size, "–" if smaller is None else str(smaller), meaning)
    console.print(axes)
    parts = Table("part", "parameters", "share", box=None, header_style="bold")
    for part, count in sorted(found["parameters_by_group"].items(), key=lambda item: -item[1]):
        parts.add_row(part, f"{count:,}", f"{count / checkpoint.parameters:.1%}")
    console.print(parts)
    console.print(
        f"{found['flops_per_token'] / 1e6:,.0f} MFLOP and {found['kv_bytes_per_token'] / 1e3:,.1f} kB of KV cache "
        "per token"
    )
    if checkpoint.config.tie_word_embeddings:
        console.print("The output head is tied to the embedding and counted once.")
