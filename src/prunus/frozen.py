"""Models that are only read from: on a CPU their weights lie in the layout that oneDNN multiplies by.

Each GEMM lays out its weights anew otherwise. The products are the same bits 9–18 % sooner, for a teacher whose weights
never change; a student's change with each step.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import hardware

TOKENS = 1024
"""Rows that the layout is chosen for; it serves others as well."""

UNCALLED = ("dt_proj",)
"""Projections whose weight alone is read, by the code around them: Mamba's."""

Model = TypeVar("Model", bound=PreTrainedModel)


class Frozen(nn.Linear):
    """What a Linear becomes. Its weight keeps its shape and size, and nothing but this product can be had of it."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return out


@torch.no_grad()
def freeze(model: Model) -> Model:
    """No gradients for this model; and in bfloat16 on a CPU that multiplies it, its projections laid out. It can then
    no longer be trained, saved, moved or compiled. The head stays as it is, for the loss to read."""
    head = model.requires_grad_(False).get_output_embeddings()
    for name, module in model.named_modules():
        called = module is not head and not name.endswith(UNCALLED)
        if called and type(module) is nn.Linear and _suits(module.weight):
            layout = torch.ops.mkldnn._reorder_linear_weight(module.weight, TOKENS)
            module.weight = nn.Parameter(layout, requires_grad=False)
            module.__class__ = Frozen
    return model


def is_frozen(model: nn.Module) -> bool:
    return any(isinstance(module, Frozen) for module in model.modules())


def _suits(weight: Tensor) -> bool:
    return hardware.compute_dtype() == weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
