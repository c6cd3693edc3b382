"""One pass over calibration text → sufficient statistics for every score. Scores are made from them in `importance`.

Shapes: L layers, B blocks (samples), S tokens of a block, H hidden channels, F FFN neurons, A query heads, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prunus import dims, hardware, layerwise
from prunus.checkpoint import Checkpoint
from prunus.families import Family
from prunus.head import head_of
from prunus.layerwise import TokenBlocks
from prunus.scores import load_tensors, save_tensors
from prunus.source import Source, opened
from prunus.weights import Parts

BATCH_BLOCKS = 4
GRAM_TOKENS = 8192
"""Tokens of one product XᵀX: one of several batches is faster than a sum of small ones."""
SOLVED_COLUMNS = 1024
"""Columns of a triangular inverse that are in memory at once."""
REDUCTIONS = ("mean", "l2", "var")
"""Order of the reductions over a block's tokens in the first dimension of `Statistics.reductions`."""


@dataclass(frozen=True)
class Statistics:
    """What a pass over text leaves behind.

    Attributes:
        reductions: signal → float32 [3, 2, L, C]: for each reduction over the tokens of a block (mean of |x|, L2,
            variance) the sum and the sum of squares over blocks. Signals: "activation" and "preactivation" (FFN),
            "head_output" (L2 norm of each head), "norm_output" (hidden; its L counts the norms).
        energies: norm → Σ (x/rms)² per channel of its input, [L, H] for most; the final norm [H].
        sums: "cosine" [L]: Σ cos(layer input, layer output) over tokens; and, of the weights, squared norms
            "ffn_weight" [L, F], "head_weight" [L, A], "kv_weight" [L, G], "hidden_weight" [H], "write_weight" [L, F].
        inverse_gram: "ffn" → diag of (E[hhᵀ] + λI)⁻¹, [L, F]; empty unless measured with `grams`.
        num_blocks, num_tokens: of the text.
        provenance: teacher, text.
    """

    reductions: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    inverse_gram: Mapping[str, Tensor]
    num_blocks: int
    num_tokens: int
    provenance: Mapping[str, str] = field(default_factory=dict)


@torch.no_grad()
def measure(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    grams: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics of every width axis and of Block Influence, in one layer-by-layer pass without the output head.

    Args:
        blocks: calibration text.
        source: where the teacher's layers are, if it is at hand; opened otherwise, on disk where memory is short.
        grams: also the Gram matrix of each FFN's neurons, for the "reconstruction" score. One is alive at a time;
            without them the pass costs about half as much.
        progress: called with the layers done and in all.
    """
    source, family = source or opened(teacher), teacher.family
    with source.outer():
        batches = layerwise.enter_all(source.model, blocks, batch_blocks=BATCH_BLOCKS)
    count = teacher.architecture.layers
    passes = [_LayerPass(family, grams=grams, head_dim=teacher.architecture.head_dim) for _ in range(count)]
    for number, layer in enumerate(source.layers()):
        with layerwise.observe(layer, passes[number].observers()):
            for batch in batches:
                before = batch.stream_BSH
                batch.stream_BSH = layerwise.run_layer(layer, before, batch.layer_inputs[number])
                passes[number].add_cosine(before, batch.stream_BSH)
        passes[number].finish()
        progress(number + 1, count)
    final = _Reducer()
    final_energy = torch.zeros(teacher.architecture.hidden, device=hardware.device())
    with source.filled(family.final_norm) as norm:
        for batch in batches:
            final_energy += _energy(batch.stream_BSH, centred=family.centred)
            final.add(norm(batch.stream_BSH))
    return _collect(teacher, blocks, passes, final, final_energy)


def _collect(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    passes: list[_LayerPass],
    final: _Reducer,
    final_energy: Tensor,
) -> Statistics:
    family = teacher.family
    signals = {
        signal: torch.stack([layer.reducers[signal].total for layer in passes], dim=2).cpu()
        for signal in passes[0].reducers.keys() & {"activation", "preactivation", "head_output"}
    }
    norms = [layer.reducers[branch.norm].total for layer in passes for branch in family.branches if branch.norm]
    signals["norm_output"] = torch.stack([*norms, final.total], dim=2).cpu()
    energies = {site: torch.stack([layer.energies[site] for layer in passes]).cpu() for site in passes[0].energies}
    tokens = sum(layer.num_tokens for layer in passes[:1])
    return Statistics(
        reductions=signals,
        energies=energies | {family.final_norm: final_energy.cpu()},
        sums={"cosine": torch.stack([layer.cosine for layer in passes]).cpu(), **_weight_norms(teacher)},
        inverse_gram={"ffn": torch.stack([layer.inverse_gram for layer in passes]).cpu()} if passes[0].grams else {},
        num_blocks=len(blocks),
        num_tokens=tokens,
        provenance={
            "teacher": teacher.fingerprint,
            "text": getattr(blocks, "fingerprint", ""),
            "tokens": str(tokens),
            "blocks": str(len(blocks)),
        },
    )


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

    def __init__(self, family: Family, *, grams: bool, head_dim: int) -> None:
        self.family, self.grams, self.head_dim = family, grams, head_dim
        self.reducers: dict[str, _Reducer] = defaultdict(_Reducer)
        self.energies: dict[str, Tensor] = {}
        self.cosine: Tensor = torch.zeros(())
        self.num_tokens = 0
        self.pending: list[Tensor] = []
        self.gram: Tensor | None = None
        self.inverse_gram: Tensor = torch.zeros(())

    def observers(self) -> dict[str, Callable[[Tensor, Tensor], None]]:
        observers: dict[str, Callable[[Tensor, Tensor], None]] = {}
        for branch in self.family.branches:
            if branch.norm:
                observers[branch.norm] = self._see_norm(branch.norm)
            if branch.post_norm:
                observers[branch.post_norm] = self._see_other_norm(branch.post_norm)
            observers[branch.write] = self._see_heads if branch.inner == "heads" else self._see_ffn
            if branch.gate:
                observers[branch.gate] = lambda _, output: self.reducers["preactivation"].add(output)
        return observers | {norm: self._see_other_norm(norm) for norm in self.family.norms}

    def _see_norm(self, site: str) -> Callable[[Tensor, Tensor], None]:
        def see(stream_BSH: Tensor, output_BSH: Tensor) -> None:
            self._add_energy(site, stream_BSH)
            self.reducers[site].add(output_BSH)

        return see

    def _see_other_norm(self, site: str) -> Callable[[Tensor, Tensor], None]:
        return lambda x_BSC, _: self._add_energy(site, x_BSC)

    def _add_energy(self, site: str, x_BSH: Tensor) -> None:
        self.energies[site] = self.energies.get(site, 0) + _energy(x_BSH, centred=self.family.centred)

    def _see_heads(self, inner_BSD: Tensor, _: Tensor) -> None:
        per_head_BSAD = inner_BSD.unflatten(-1, (-1, self.head_dim))
        self.reducers["head_output"].add(torch.linalg.vector_norm(per_head_BSAD, dim=-1, dtype=torch.float32))

    def _see_ffn(self, inner_BSF: Tensor, _: Tensor) -> None:
        self.reducers["activation"].add(inner_BSF)
        if self.grams:
            self.pending.append(inner_BSF.flatten(0, 1))
            if sum(map(len, self.pending)) >= GRAM_TOKENS:
                self._add_pending()

    def _add_pending(self) -> None:
        gram = layerwise.gram(torch.cat(self.pending))
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.pending.clear()

    def add_cosine(self, before_BSH: Tensor, after_BSH: Tensor) -> None:
        self.cosine = self.cosine + F.cosine_similarity(before_BSH, after_BSH, dim=-1).sum(dtype=torch.float32)
        self.num_tokens += before_BSH.shape[0] * before_BSH.shape[1]

    def finish(self) -> None:
        if self.pending:
            self._add_pending()
        if self.gram is not None:
            self.inverse_gram = inverse_diagonal(self.gram / self.num_tokens)
            self.gram = None


def _energy(x_BSH: Tensor, *, centred: bool) -> Tensor:
    """Σ over tokens of (x/rms)², float32 [H]: one pass for the squares and one matrix-vector product.

    Args:
        centred: of x less its mean, which is what a LayerNorm divides.
    """
    x_NH = x_BSH.flatten(0, 1).float()
    squares_NH = (x_NH - x_NH.mean(1, keepdim=True) if centred else x_NH).square()
    return squares_NH.mean(1).clamp_min_(1e-30).reciprocal_() @ squares_NH


def inverse_diagonal(gram_FF: Tensor, *, damping: float = 0.01) -> Tensor:
    """diag (G + λI)⁻¹ with λ = damping · mean diag G; float32 [F]. Its inverse is the energy of a neuron that the
    others cannot linearly predict."""
    gram_FF = gram_FF.clone()
    diagonal_F = gram_FF.diagonal()
    diagonal_F += damping * diagonal_F.mean().clamp_min(1e-12)  # a layer may be dead
    factor_FF = torch.linalg.cholesky(gram_FF, out=gram_FF)
    # (LLᵀ)⁻¹ = L⁻ᵀL⁻¹, whose diagonal is the squared norms of the columns of L⁻¹; LAPACK's whole inverse is slower. A
    # column of L⁻¹ begins on the diagonal, so that of later ones ever smaller triangles are solved.
    squared_F = torch.empty_like(diagonal_F)
    for start in range(0, len(factor_FF), SOLVED_COLUMNS):
        stop = min(start + SOLVED_COLUMNS, len(factor_FF))
        columns = torch.eye(len(factor_FF) - start, stop - start, device=factor_FF.device)
        solved = torch.linalg.solve_triangular(factor_FF[start:, start:], columns, upper=False)
        squared_F[start:stop] = solved.square_().sum(0)
    return squared_F


def _weight_norms(teacher: Checkpoint) -> dict[str, Tensor]:
    """Squared norms of the weights that belong to each neuron, head, group and hidden channel."""
    family, sizes = teacher.family, teacher.architecture
    units = {"ffn": "ffn_weight", "heads": "head_weight", "kv_heads": "kv_weight"}
    norms = {key: torch.zeros(sizes.layers, sizes[unit]) for unit, key in units.items()}
    norms["hidden_weight"] = torch.zeros(sizes.hidden)
    norms["write_weight"] = torch.zeros(sizes.layers, sizes.ffn)
    writes = {f"{branch.write}.weight" for branch in family.branches if branch.inner == "ffn"}
    for name, tensor in teacher.tensors():
        formulas = teacher.layout[name]
        if len(formulas) < 2:
            continue
        layer, local = family.split(name)
        squares = _squares(tensor)
        for along, formula in zip(squares, formulas, strict=True):
            if formula == "hidden":
                norms["hidden_weight"] += along
            for unit in dims.names(formula) & units.keys():
                if layer is not None:
                    owner = dims.owner(formula, sizes, unit)
                    norms[units[unit]][layer].index_add_(0, owner[owner >= 0], along[owner >= 0])
        if local in writes and layer is not None:
            norms["write_weight"][layer] += squares[1]
    return norms


def _squares(tensor: Parts) -> tuple[Tensor, Tensor]:
    """Squared norms of a matrix's rows, and of its columns."""
    rows, columns = (torch.zeros(size) for size in tensor.shape)
    for place, part in tensor.numbered():
        squares = part.to(torch.float32, copy=True).square_()
        rows[place] = squares.sum(1)
        columns += squares.sum(0)
    return rows, columns


@torch.no_grad()
def leave_one_out(
    teacher: Checkpoint,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, Tensor]:
    """Loss of the teacher, and with each layer removed.

    Layer-major: the variants "without layer j", j ≤ i, go through layer i together with the whole model, so weights
    are read once and the shared prefix is computed once: L²/2 layer passes instead of L².

    Returns:
        loss of the whole model, and float32 [L] losses, nats per predicted token.
    """
    source, count = source or opened(teacher), teacher.architecture.layers
    total, counted = torch.zeros(count + 1, dtype=torch.float64), 0
    with source.outer():
        whole = layerwise.enter_all(source.model, blocks, batch_blocks=BATCH_BLOCKS)
    variants: list[list[Tensor]] = [[] for _ in whole]
    for number, layer in enumerate(source.layers()):
        for batch, streams in zip(whole, variants, strict=True):
            inputs = batch.layer_inputs[number]
            streams[:] = [layerwise.run_layer(layer, stream, inputs) for stream in streams]
            streams.append(batch.stream_BSH)
            batch.stream_BSH = layerwise.run_layer(layer, batch.stream_BSH, inputs)
        progress(number + 1, count)
    family, model = teacher.family, source.model
    with source.filled(family.final_norm) as norm, source.filled(family.head):
        for place, (batch, streams) in enumerate(zip(whole, variants, strict=True)):
            start = place * BATCH_BLOCKS
            indices = list(range(start, start + len(batch.stream_BSH)))
            tokens_BS, positions_BS = (part.to(batch.stream_BSH.device) for part in blocks.batch(indices))
            targets_BS = positions_BS[:, 1:] == positions_BS[:, :-1] + 1
            counted += int(targets_BS.sum())
            for variant, stream in enumerate([*streams, batch.stream_BSH]):
                hidden_NH = norm(stream)[:, :-1][targets_BS]
                total[variant] += _summed_loss(model, hidden_NH, tokens_BS[:, 1:][targets_BS])
    losses = total / counted
    return float(losses[-1]), losses[:-1].float()


def with_leave_one_out(
    teacher: Checkpoint,
    statistics: Statistics,
    blocks: TokenBlocks,
    *,
    source: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """The statistics with the rise of the loss per removed layer, for the score layers=leave_one_out."""
    whole, losses = leave_one_out(teacher, blocks, source=source, progress=progress)
    return replace(statistics, sums={**statistics.sums, "leave_one_out": losses - whole})


def _summed_loss(model: PreTrainedModel, hidden_NH: Tensor, labels_N: Tensor, *, chunk_tokens: int = 256) -> float:
    """Σ cross-entropy, the logits a chunk at a time in float32."""
    total = 0.0
    for hidden, labels in zip(hidden_NH.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True):
        total += float(F.cross_entropy(head_of(model).logits(hidden), labels, reduction="sum"))
    return total


def save_statistics(statistics: Statistics, to: Path) -> None:
    groups = {name: getattr(statistics, name) for name in ("reductions", "energies", "sums", "inverse_gram")}
    save_tensors(groups, statistics.provenance, to)


def load_statistics(file: Path) -> Statistics:
    groups, provenance = load_tensors(file)
    return Statistics(
        reductions=groups["reductions"],
        energies=groups["energies"],
        sums=groups["sums"],
        inverse_gram=groups.get("inverse_gram", {}),
        num_blocks=int(provenance["blocks"]),
        num_tokens=int(provenance["tokens"]),
        provenance=provenance,
    )
