"""float32 weights and AdamW's moments, of a model that computes in a shorter type or is spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from prunus import hardware, parallel

MOMENTS = ("exp_avg", "exp_avg_sq")


class Masters:
    """A model's trained weights in float32, which is what the optimizer sees.

    Gradients of the micro-batches are added up in float32, the update happens in float32, and the model gets rounded
    copies. The backward pass hands each gradient over as soon as it is there: it is still in the cache, and the short
    ones are never all in memory. All memory of the optimizer is taken here, so that a step cannot run out of it later
    than the first.

    Attributes:
        values: name → float32 weight.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, weight_decay: float) -> None:
        self.values = self._prepare(model.train(), dtype)
        self.optimizer = _adamw(list(self.values.values()), weight_decay)
        for value in self.values.values():
            step = torch.zeros((), device=value.device)
            self.optimizer.state[value] = {"step": step, **{name: torch.zeros_like(value) for name in MOMENTS}}

    def _prepare(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's own float32 weights become the masters; it gets new, rounded ones (or shares them in float32)."""
        values = {name: value.detach().float() for name, value in _trained(model).items()}
        for value in values.values():
            value.requires_grad_(True)
            value.grad = torch.zeros_like(value)
        hardware.place(model, dtype=dtype)
        _let_embeddings_be_sparse(model)
        self.copies = {name: copy for name, copy in model.named_parameters() if name in values}
        self.stale = set(values)
        for name, copy in self.copies.items():
            hand_over = partial(_hand_over, to=values[name], name=name, stale=self.stale)
            copy.register_post_accumulate_grad_hook(hand_over)
        return values

    def clip(self, most: float) -> float:
        """Scale the gradients down to a norm of at most `most`; returns what the norm was."""
        self._finish_gradients()
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        norm = parallel.whole(torch.nn.utils.get_total_norm(gradients))
        if not norm <= most:  # also where it is not a number; otherwise it would be a pass that multiplies by 1
            torch.nn.utils.clip_grads_with_norm_(self.values.values(), most, norm)
        return float(norm)

    def step(self, rate: float) -> None:
        """One update at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.publish()

    def forget_gradients(self) -> None:
        """Let the next gradients replace these, which saves a pass over zeros."""
        self.stale.update(self.values)

    def _finish_gradients(self) -> None:
        """A weight that had no part in this step has no gradient, not that of the step before."""
        for name in self.stale:
            gradient = self.values[name].grad
            assert gradient is not None
            gradient.zero_()
        self.stale.clear()

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model rounded copies of the weights."""
        for name, copy in self.copies.items():
            copy.copy_(self.values[name])

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and step counts by name, in place: what is stored, and filled again."""
        state: dict[str, Tensor] = {}
        for name, value in self.values.items():
            state[f"weight/{name}"] = value.detach()
            state |= {f"{key}/{name}": part for key, part in self.optimizer.state[value].items()}
        return state

    def weights(self, dtypes: Mapping[str, torch.dtype], *, prefix: str = "") -> dict[str, Tensor]:
        """Whole weights on the CPU, of the part whose names begin so, by the rest of their names. A collective: every
        rank must call it, and the first alone gets them.

        Args:
            dtypes: by the rest of a name.
        """
        found = {}
        for name, value in self.values.items():
            if name.startswith(prefix):
                whole, rest = parallel.whole(value.detach()), name.removeprefix(prefix)
                if parallel.world().first:
                    found[rest] = whole.to("cpu", dtypes[rest])
        return found


class ShardedMasters(Masters):
    """The same where the model is sharded (`parallel.shard`): FSDP keeps the float32 weights, sums the gradients and
    makes the rounded copies itself."""

    def _prepare(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return _trained(model)

    def publish(self) -> None:
        pass

    def _finish_gradients(self) -> None:
        pass

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def _hand_over(copy: Tensor, *, to: Tensor, name: str, stale: set[str]) -> None:
    """Move the gradient of a rounded copy to its master: in place of a stale one, or onto it."""
    assert to.grad is not None
    assert copy.grad is not None
    if copy.grad.is_sparse:
        if name in stale:
            to.grad.zero_()
        to.grad.index_add_(0, copy.grad._indices()[0], copy.grad._values().to(to.dtype))
    elif name in stale:
        to.grad.copy_(copy.grad)
    else:
        to.grad.add_(copy.grad)
    stale.discard(name)
    copy.grad = None


def _let_embeddings_be_sparse(model: nn.Module) -> None:
    """The gradient of an embedding is that of the tokens' rows. Where the head is tied, autograd adds them to the
    head's gradient in place; dense, it would be a pass over zeros and another to add them."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.device.type == "cpu":
            module.sparse = True


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _adamw(values: list[Tensor], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; β₂ = 0.95 as is usual for language models."""
    matrices = [value for value in values if value.ndim >= 2]
    vectors = [value for value in values if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
