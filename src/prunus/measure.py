"""One pass over calibration text → sufficient statistics for every score. Scores are made from them in `importance`.

Shapes: L layers, B blocks (samples), S tokens of a block, H hidden channels, F FFN neurons, A query heads, G groups of
them, P parts of any kind, of D columns each, O channels that are written, K rows of a sketch, C channels.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus import experts, hardware, layerwise, measuring
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.families import Family
from prunus.layerwise import TokenBlocks
from prunus.measuring import SUMMED, check_measuring
from prunus.scores import load_tensors, save_tensors
from prunus.sensitivity import Sketches, sensitivity
from prunus.source import Source, opened
from prunus.weight_norms import HEADS, weight_norms

BATCH_BLOCKS = measuring.BATCH_BLOCKS
REDUCTIONS = ("mean", "l2", "var")
"""Order of the reductions over a block's tokens in the first dimension of `Statistics.reductions`."""


@dataclass(frozen=True)
class Statistics:
    """What a pass over text leaves behind.

    Attributes:
        reductions: signal → float32 [3, 2, L, C]: for each reduction over the tokens of a block (mean of |x|, L2,
            variance) the sum and the sum of squares over blocks. Signals: "activation/" and "preactivation/" of "ffn"
            and "shared_ffn", "output/heads" (L2 norm of each head), "output/hidden" (of the norms, which its L counts).
        energies: norm → Σ (x/rms)² per channel of its input, [L, H] for most; the final norm [H].
        sums: "cosine" [L]: Σ cos(layer input, layer output) over tokens. Of experts [L, E], over the tokens that each
            was sent: "tokens/experts" their number, "output/experts" Σ w‖y‖ with the router's weight w and its output
            y, and [L, E, F] "energy/expert_ffn" Σ (w h)² of its neurons h. "bare/hidden" [L, H]: the energies of what
            enters a layer that reads the stream without a norm; of latents "energy/" and the axis, [L, C];
            "energy/mamba_head_dim" Σ over heads of x².
            "written/" and "ffn", "shared_ffn", "heads", "kv_heads" [L, C]: Σ of the squared norm of what a part
            writes; "damage/" what it costs in nats if that is not there (½ E[(g·δ)²], see `sensitivity`), and the same
            as "written/" where no gradients are known.
            Of the weights, squared norms "weight/" and the axis: [L, C], [H] for hidden, [L, E, F] for expert_ffn; and
            "write/expert_ffn" of the columns that write.
        num_blocks, num_tokens: of the text.
        provenance: teacher, text, and whether gradients are known.

    Where layers are of several kinds, a layer that lacks what is summed has zeros.
    """

    reductions: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    num_blocks: int
    num_tokens: int
    provenance: Mapping[str, str] = field(default_factory=dict)

    def with_sums(self, found: Mapping[str, Tensor]) -> Statistics:
        """These, and more of the `sums`."""
        return replace(self, sums={**self.sums, **found})


@torch.no_grad()
def measure(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    gradients: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics of every width axis and of Block Influence, in one layer-by-layer pass without the output head.

    Args:
        blocks: calibration text.
        source: where the teacher's layers are, if it is at hand; opened otherwise, on disk where memory is short.
        gradients: count errors of what neurons and heads write as the loss minds them (`sensitivity`), which takes a
            backward pass over a part of the text; not where the model is on disk.
        progress: called with the layers done and in all.
    Raises:
        BadCheckpoint: what the model computes is not finite.
        DoesNotFit: it would take more memory than is free; says how much text would do.
    """
    size = blocks.batch([0])[0].shape[-1]
    check_measuring(teacher, blocks=len(blocks), block_size=size, gradients=gradients, source=source)
    source, family = source or opened(teacher), teacher.family
    sketches = sensitivity(source.model, family, blocks) if gradients and source.whole else None
    with source.outer():
        batches = layerwise.enter_all(source.model, blocks, batch_blocks=BATCH_BLOCKS)
    count = teacher.architecture.layers
    passes = [_LayerPass(family, teacher.architecture) for _ in range(count)]
    for number, layer in enumerate(source.layers()):
        with passes[number].observing(layer):
            for batch in batches:
                before = batch.stream_BSH
                passes[number].batch_shape = before.shape[:2]
                batch.stream_BSH = layerwise.run_layer(layer, before, batch.layer_inputs[number])
                passes[number].add_stream(before, batch.stream_BSH)
        layerwise.check_finite(passes[number].cosine, f"what layer {number} of the model computes")
        passes[number].add_written(_written(layer, number, family, sketches))
        progress(number + 1, count)
    final = _Reducer()
    final_energy = torch.zeros(teacher.architecture.hidden, device=hardware.device())
    with source.filled(family.final_norm) as norm:
        for batch in batches:
            final_energy += _energy(batch.stream_BSH, centred=family.centred)
            final.add(norm(batch.stream_BSH))
    return _collect(teacher, blocks, passes, final, final_energy, blind=sketches is None)


def _collect(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    passes: list[_LayerPass],
    final: _Reducer,
    final_energy: Tensor,
    *,
    blind: bool,
) -> Statistics:
    family, tokens = teacher.family, passes[0].num_tokens
    norms = {branch.norm for branch in family.branches}
    read = [reducer.total for layer in passes for name, reducer in layer.reducers.items() if name in norms]
    signals = _stacked([{n: r.total for n, r in layer.reducers.items() if n not in norms} for layer in passes], dim=2)
    energies = _stacked([layer.energies for layer in passes])
    sums = _stacked([{"cosine": layer.cosine, **layer.sums} for layer in passes])
    latents = {f"energy/{axis}": energies[norm].clone() for axis, norm in family.latents.items() if norm in energies}
    return Statistics(
        reductions=signals | {"output/hidden": torch.stack([*read, final.total], dim=2).cpu()},
        energies=energies | {family.final_norm: final_energy.cpu()},
        sums=sums | latents | weight_norms(teacher),
        num_blocks=len(blocks),
        num_tokens=tokens,
        provenance={
            "teacher": teacher.fingerprint,
            "text": getattr(blocks, "fingerprint", ""),
            "tokens": str(tokens),
            "blocks": str(len(blocks)),
            "gradients": "none" if blind else "of the loss",
        },
    )


def _written(
    layer: nn.Module, number: int, family: Family, sketches: Sketches | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Axis → the weight by which its parts write [O, F], and as the loss minds it [K, F] where gradients are known."""
    found = {}
    for branch in layerwise.branches_of(layer, family):
        if branch.write is not None and branch.inner not in SUMMED:
            weight_OF = layerwise.weight_of(layer.get_submodule(branch.write))
            sketch = None if sketches is None else sketches[number, branch.write]
            found[branch.inner] = weight_OF, weight_OF if sketch is None else sketch @ weight_OF.float() / math.sqrt(2)
    return found


def _stacked(layers: Sequence[Mapping[str, Tensor]], *, dim: int = 0) -> dict[str, Tensor]:
    """Each name's tensors of all layers, on the CPU; zeros stand for those that a layer lacks."""
    examples = {name: value for layer in layers for name, value in layer.items()}
    return {
        name: torch.stack([layer.get(name, torch.zeros_like(example)) for layer in layers], dim=dim).cpu()
        for name, example in examples.items()
    }


class _Reducer:
    """[3, 2, C]: each reduction over tokens, summed and sum-of-squares over blocks."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())

    def add(self, x_BSC: Tensor) -> None:
        tokens = x_BSC.shape[1]
        # One copy, worked in place: on a CPU vector_norm along this dimension takes ten times as long.
        work_BSC = x_BSC.to(torch.float32, copy=True)
        mean_BC = work_BSC.mean(dim=1)
        magnitude_BC = work_BSC.abs_().mean(dim=1)
        square_BC = work_BSC.square_().sum(dim=1)
        variance_BC = (square_BC / tokens - mean_BC.square()).clamp_min(0)
        reduced_3BC = torch.stack([magnitude_BC, square_BC.sqrt(), variance_BC])
        self.total = self.total + torch.stack([reduced_3BC.sum(1), reduced_3BC.square().sum(1)], dim=1)


class _LayerPass:
    """What is gathered while all text goes through one layer."""

    def __init__(self, family: Family, sizes: Architecture) -> None:
        self.family, self.sizes = family, sizes
        self.reducers: dict[str, _Reducer] = defaultdict(_Reducer)
        self.energies: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.cosine: Tensor = torch.zeros(())
        self.num_tokens = 0
        self.batch_shape: torch.Size = torch.Size()
        self.head_grams: Tensor = torch.zeros(())

    @contextlib.contextmanager
    def observing(self, layer: nn.Module) -> Iterator[None]:
        """Inside, what the layer computes is gathered."""
        branches = layerwise.branches_of(layer, self.family)
        observers: dict[str, Callable[[Tensor, Tensor], None]] = {}
        with contextlib.ExitStack() as stack:
            for branch in branches:
                if branch.norm:
                    observers[branch.norm] = self._see_norm(branch.norm)
                if branch.post_norm:
                    observers[branch.post_norm] = self._see_other_norm(branch.post_norm)
                if branch.write:
                    heads = branch.inner in HEADS
                    observers[branch.write] = (self._see_heads if heads else self._see_ffn)(branch.inner)
                if branch.gate:
                    observers[branch.gate] = self._see_gate(branch.inner)
                if branch.experts:
                    module = experts.of(layer, branch.experts)
                    stack.enter_context(experts.observed(module, self._see_expert))
            observers |= {norm: self._see_other_norm(norm) for norm in self.family.norms if layerwise.has(layer, norm)}
            for norm, groups in self.family.gated_norms.items():
                if layerwise.has(layer, norm):
                    gated = layer.get_submodule(norm)
                    stack.callback(gated.register_forward_hook(self._see_gated(norm, self.sizes[groups])).remove)
            stack.enter_context(layerwise.observe(layer, observers))
            yield

    def _see_norm(self, site: str) -> Callable[[Tensor, Tensor], None]:
        def see(stream_BSH: Tensor, output_BSH: Tensor) -> None:
            self._add_energy(site, stream_BSH)
            self.reducers[site].add(self._blocks(output_BSH))

        return see

    def _see_other_norm(self, site: str) -> Callable[[Tensor, Tensor], None]:
        return lambda x_BSC, _: self._add_energy(site, x_BSC)

    def _add_energy(self, site: str, x_BSH: Tensor) -> None:
        self.energies[site] = self.energies.get(site, 0) + _energy(x_BSH, centred=self.family.centred)

    def _see_heads(self, axis: str) -> Callable[[Tensor, Tensor], None]:
        def see(inner_BSD: Tensor, _: Tensor) -> None:
            per_head_BSAD = inner_BSD.unflatten(-1, (self.sizes[axis], -1))
            self.reducers[f"output/{axis}"].add(torch.linalg.vector_norm(per_head_BSAD, dim=-1, dtype=torch.float32))
            if axis == "mamba_heads":
                energy_D = per_head_BSAD.float().square().sum((0, 1, 2))
                self.sums["energy/mamba_head_dim"] = self.sums.get("energy/mamba_head_dim", 0) + energy_D
            if axis not in SUMMED:
                groups = inner_BSD.flatten(0, -2).chunk(self.sizes.get("kv_heads", self.sizes[axis]), dim=1)
                self.head_grams = self.head_grams + torch.stack([layerwise.gram(group_ND) for group_ND in groups])

        return see

    def _see_gated(self, norm: str, groups: int) -> Callable[..., None]:
        """A norm of x·silu(z), which it norms in groups."""

        def see(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            x_BSD, gate_BSD = args
            product = (x_BSD.float() * F.silu(gate_BSD.float())).unflatten(-1, (groups, -1))
            energies = [_energy(part, centred=False) for part in product.unbind(-2)]
            self.energies[norm] = self.energies.get(norm, 0) + torch.cat(energies)

        return see

    def _see_gate(self, axis: str) -> Callable[[Tensor, Tensor], None]:
        return lambda _, output: self.reducers[f"preactivation/{axis}"].add(self._blocks(output))

    def _see_ffn(self, axis: str) -> Callable[[Tensor, Tensor], None]:
        return lambda inner, _: self.reducers[f"activation/{axis}"].add(self._blocks(inner))

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, S, C]; some layers and all mixtures of experts hand tokens on without the blocks that they are of."""
        return x if x.ndim == 3 else x.view(*self.batch_shape, -1)

    def _see_expert(self, routed: experts.Routed) -> None:
        sizes, here = self.sizes, routed.expert
        for name, shape in (
            ("tokens/experts", (sizes.experts,)),
            ("output/experts", (sizes.experts,)),
            ("energy/expert_ffn", (sizes.experts, sizes.expert_ffn)),
        ):
            if name not in self.sums:
                self.sums[name] = torch.zeros(shape, device=routed.inner_NF.device)
        weight_N = routed.weight_N.float()
        self.sums["tokens/experts"][here] += len(weight_N)
        self.sums["output/experts"][here] += (weight_N * routed.output_NH.float().norm(dim=1)).sum()
        self.sums["energy/expert_ffn"][here] += weight_N.square() @ routed.inner_NF.float().square()

    def add_stream(self, before_BSH: Tensor, after_BSH: Tensor) -> None:
        if any(branch.norm is None for branch in self.family.branches):
            energy_H = _energy(before_BSH, centred=self.family.centred)
            self.sums["bare/hidden"] = self.sums.get("bare/hidden", 0) + energy_H
        # In bfloat16 a cosine near 1 is known to 1/256 only, and what it lacks to 1 is the score of the layer.
        self.cosine = self.cosine + F.cosine_similarity(before_BSH.float(), after_BSH.float(), dim=-1).sum()
        self.num_tokens += before_BSH.shape[0] * before_BSH.shape[1]

    def add_written(self, written: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """What each part of these axes writes, by its size and as the loss minds it; once all text went through."""
        for axis, (weight_OF, minded_KF) in written.items():
            for part, gram_PDD in self._grams(axis).items():
                self.sums[f"written/{part}"] = _squares(gram_PDD, weight_OF)
                self.sums[f"damage/{part}"] = _squares(gram_PDD, minded_KF)
        self.head_grams = torch.zeros(())  # nothing of that size is kept of all layers

    def _grams(self, axis: str) -> dict[str, Tensor]:
        """Kind of part → Σ over tokens of x xᵀ of each, [P, D, D]; neurons have one value each."""
        if axis != "heads":
            reducer = self.reducers.get(f"activation/{axis}")
            return {} if reducer is None else {axis: reducer.total[REDUCTIONS.index("l2"), 1, :, None, None]}
        per_group = self.sizes.heads // len(self.head_grams)
        blocks = self.head_grams.unflatten(2, (per_group, -1)).unflatten(1, (per_group, -1))
        alone = {"heads": blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)}
        return alone | ({"kv_heads": self.head_grams} if "kv_heads" in self.sizes else {})


def _squares(gram_PDD: Tensor, weight_KF: Tensor) -> Tensor:
    """Σ over tokens of ‖W_p x_p‖² for each part p, [P]: tr W_p (Σ x xᵀ) W_pᵀ."""
    # A part or some rows at a time: a whole weight in float32 is as large as all else that a streamed model needs.
    if gram_PDD.shape[-1] == 1:  # products of thousands of single columns take long
        return gram_PDD.flatten() * torch.stack([rows.float().square().sum(0) for rows in weight_KF.split(512)]).sum(0)
    parts = zip(weight_KF.chunk(len(gram_PDD), dim=1), gram_PDD, strict=True)
    return torch.stack([(part_KD.float() @ gram_DD * part_KD).sum() for part_KD, gram_DD in parts])


def _energy(x_BSH: Tensor, *, centred: bool) -> Tensor:
    """Σ over tokens of (x/rms)², float32 [H]: one pass for the squares and one matrix-vector product.

    Args:
        centred: of x less its mean, which is what a LayerNorm divides.
    """
    x_NH = x_BSH.flatten(0, -2).float()
    squares_NH = (x_NH - x_NH.mean(1, keepdim=True) if centred else x_NH).square()
    return squares_NH.mean(1).clamp_min_(1e-30).reciprocal_() @ squares_NH


def save_statistics(statistics: Statistics, to: Path) -> None:
    groups = {name: getattr(statistics, name) for name in ("reductions", "energies", "sums")}
    save_tensors(groups, statistics.provenance, to)


def load_statistics(file: Path) -> Statistics:
    groups, provenance = load_tensors(file)
    return Statistics(
        reductions=groups["reductions"],
        energies=groups["energies"],
        sums=groups["sums"],
        num_blocks=int(provenance["blocks"]),
        num_tokens=int(provenance["tokens"]),
        provenance=provenance,
    )
