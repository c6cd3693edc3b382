"""SliceGPT: every block's stream rotated into its principal components, of which the last ones leave.

Source: arXiv:2401.15024. Norm weights go into the projections behind them, the head is untied from the embedding, and
where two bases meet, each residual connection multiplies by a matrix of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, layerwise

from .bench import Bench, Inapplicable, count

READS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITES = {"input_layernorm": "self_attn.o_proj", "post_attention_layernorm": "mlp.down_proj"}


class Norm(nn.Module):
    """An RMSNorm without a weight that divides by the mean over the channels that there were."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().square().sum(-1, keepdim=True) / self.channels
        return (x.float() * (mean + self.eps).rsqrt()).to(x.dtype)


class Sliced(nn.Module):
    """A decoder layer whose residual connections change the basis."""

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layer = layer
        self.shortcut_attention, self.shortcut_ffn = (nn.Parameter(torch.eye(hidden)) for _ in range(2))

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        layer = self.layer
        attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **inputs)[0]
        hidden_states = hidden_states @ self.shortcut_attention + attended
        return hidden_states @ self.shortcut_ffn + layer.mlp(layer.post_attention_layernorm(hidden_states))


def slicegpt(bench: Bench) -> PreTrainedModel:
    """With as many channels as fit, its shortcut matrices and its untied head counted."""
    return _sliced(bench, counted=True)


def slicegpt_uncounted(bench: Bench) -> PreTrainedModel:
    """With as many channels as would fit without its shortcut matrices and its untied head: more than it may have."""
    return _sliced(bench, counted=False)


@torch.no_grad()
def _sliced(bench: Bench, *, counted: bool) -> PreTrainedModel:
    model, sizes = bench.model(), bench.teacher.architecture
    _fuse(model)
    layers = [Sliced(layer, sizes.hidden) for layer in anatomy.layers_of(model)]
    kept = _channels(bench, counted=counted)
    streams, inputs = _entered(model, bench)
    basis = _principal(streams, kept)
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight @ basis)
    streams = [stream @ basis @ basis.T for stream in streams]
    for number, sliced in enumerate(layers):
        for norm, shortcut in (("input_layernorm", "shortcut_attention"), ("post_attention_layernorm", "shortcut_ffn")):
            layer = sliced.layer
            streams = [
                stream + _branch(layer, norm, stream, each[number])
                for stream, each in zip(streams, inputs, strict=True)
            ]
            after = _principal(streams, kept)
            for name in READS[norm]:
                _set(layer.get_submodule(name), layer.get_submodule(name).weight @ basis)
            _set(layer.get_submodule(WRITES[norm]), after.T @ layer.get_submodule(WRITES[norm]).weight)
            setattr(sliced, shortcut, nn.Parameter(basis.T @ after))
            streams, basis = [stream @ after @ after.T for stream in streams], after
    _set(model.get_output_embeddings(), model.get_output_embeddings().weight @ basis)
    anatomy.body_of(model).layers = nn.ModuleList(layers)
    model.config.hidden_size = kept
    return model


def _fuse(model: PreTrainedModel) -> None:
    """Norm weights into what reads behind them; the head becomes a weight of its own."""
    if {name for name, _ in anatomy.layers_of(model)[0].named_children()} != {"self_attn", "mlp", *READS}:
        raise Inapplicable("its rotation cannot pass a norm that stands behind a projection")
    body, head = anatomy.body_of(model), model.get_output_embeddings()
    eps = model.config.rms_norm_eps
    head.weight = nn.Parameter(head.weight * body.norm.weight)
    model.config.tie_word_embeddings = False
    body.norm = Norm(model.config.hidden_size, eps)
    for layer in anatomy.layers_of(model):
        for norm, reads in READS.items():
            for name in reads:
                linear = layer.get_submodule(name)
                linear.weight.mul_(layer.get_submodule(norm).weight)
            layer.set_submodule(norm, Norm(model.config.hidden_size, eps))


def _channels(bench: Bench, *, counted: bool) -> int:
    """How many the parameters leave; a multiple of 8."""
    sizes, model = bench.teacher.architecture, bench.model()
    per_channel = count(model) / sizes.hidden
    for kept in range(sizes.hidden // 8 * 8, 0, -8):
        extra = sizes.vocab * kept + 2 * sizes.layers * kept**2 if counted else 0
        if per_channel * kept + extra <= bench.parameters:
            return kept
    raise ValueError("even eight channels are too many")


def _entered(model: PreTrainedModel, bench: Bench) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    found = layerwise.enter_all(model, bench.calibration, batch_blocks=4)
    return [batch.stream_BSH for batch in found], [batch.layer_inputs for batch in found]


def _branch(layer: nn.Module, norm: str, stream_BSH: Tensor, inputs: dict[str, Any]) -> Tensor:
    normed_BSH = layer.get_submodule(norm)(stream_BSH)
    if norm == "input_layernorm":
        written: Tensor = layer.self_attn(hidden_states=normed_BSH, **inputs)[0]
        return written
    return layer.mlp(normed_BSH)  # type: ignore[no-any-return]


def _principal(streams: list[Tensor], kept: int) -> Tensor:
    """[H, K] components of what the norm makes of the stream, by their share of it."""
    total = torch.zeros(streams[0].shape[-1], streams[0].shape[-1], dtype=torch.float64)
    for stream_BSH in streams:
        normed_NH = stream_BSH.flatten(0, 1).double()
        normed_NH = normed_NH / normed_NH.square().mean(1, keepdim=True).sqrt()
        total += normed_NH.T @ normed_NH
    return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :kept].float()


def _set(linear: nn.Module, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.contiguous())
    linear.out_features, linear.in_features = weight.shape
