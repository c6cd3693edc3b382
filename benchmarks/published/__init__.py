"""Published methods of structured pruning, each a function from a `Bench` to a student in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from . import depth, packages, ranked, slicegpt, uneven
from .bench import Bench, Inapplicable

METHODS: Mapping[str, Callable[[Bench], PreTrainedModel]] = {
    "random": ranked.random,
    "magnitude": ranked.magnitude,
    "Wanda-SP": ranked.wanda_sp,
    "FLAP": uneven.flap,
    "LLM-Pruner": uneven.llm_pruner,
    "SliceGPT": slicegpt.slicegpt,
    "SliceGPT, extra matrices not counted": slicegpt.slicegpt_uncounted,
    "ShortGPT": depth.shortgpt,
    "LaCo": depth.laco,
    "Minitron depth (M2)": depth.contiguous,
    "Minitron width (M1)": ranked.minitron,
    "Minitron width, neurons by activation": ranked.minitron_activation,
    "Torch-Pruning": packages.torch_pruning,
    "ModelOpt's score": packages.modelopt,
}
PACKAGES = {"Torch-Pruning": "torch_pruning", "ModelOpt's score": "modelopt"}
"""Method → module without which it cannot run."""

__all__ = ["METHODS", "PACKAGES", "Bench", "Inapplicable"]
