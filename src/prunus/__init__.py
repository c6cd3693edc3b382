"""Turn a pretrained language model into smaller ones: prune its structure, then distil from the original.

import prunus as pr
teacher = pr.load("HuggingFaceTB/SmolLM2-135M")
blocks  = pr.tokenise(pr.documents("text/"), teacher.tokenizer(), block_size=512, to="blocks", label="text")
scores  = pr.score(pr.measure(teacher, blocks))
best    = pr.search(teacher, scores, pr.parse_budget(teacher, params="0.7x")).best
student = pr.prune(teacher, scores, best.architecture, to="3-pruned", calibration=blocks)
student = pr.distill(student, teacher, blocks, to="4-distilled")
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from prunus.architecture import Architecture
    from prunus.budget import Budget, parse_budget
    from prunus.checkpoint import Checkpoint, load
    from prunus.distill import distill
    from prunus.documents import documents
    from prunus.errors import PrunusError
    from prunus.evaluate import Quality, quality
    from prunus.importance import score
    from prunus.measure import Statistics, measure
    from prunus.pipeline import compress
    from prunus.prune import prune
    from prunus.recipe import Recipe
    from prunus.run import Run
    from prunus.schedule import Settings
    from prunus.scores import Scores
    from prunus.search import Candidate, Search, search
    from prunus.text import Blocks, tokenise

__all__ = [
    "Architecture",
    "Blocks",
    "Budget",
    "Candidate",
    "Checkpoint",
    "PrunusError",
    "Quality",
    "Recipe",
    "Run",
    "Scores",
    "Search",
    "Settings",
    "Statistics",
    "compress",
    "distill",
    "documents",
    "load",
    "measure",
    "parse_budget",
    "prune",
    "quality",
    "score",
    "search",
    "tokenise",
]
__version__ = "0.1.0"

_NAMES = {
    "architecture": ("Architecture",),
    "budget": ("Budget", "parse_budget"),
    "checkpoint": ("Checkpoint", "load"),
    "distill": ("distill",),
    "documents": ("documents",),
    "errors": ("PrunusError",),
    "evaluate": ("Quality", "quality"),
    "importance": ("score",),
    "measure": ("Statistics", "measure"),
    "pipeline": ("compress",),
    "prune": ("prune",),
    "recipe": ("Recipe",),
    "run": ("Run",),
    "schedule": ("Settings",),
    "scores": ("Scores",),
    "search": ("Candidate", "Search", "search"),
    "text": ("Blocks", "tokenise"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
"""Public name → its module, imported when the name is first used: torch and transformers take seconds."""


class _Package(types.ModuleType):
    """`prunus.measure` is the function, though `measure.py` is a module of the package.

    Python binds a submodule to its package when it is imported; here that would hide the function of the same name.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'prunus' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"prunus.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Callable[[str], types.ModuleType], tuple[str]]:
        """A function that names the package goes to other processes (Ray, joblib): as with any module, by its name."""
        return importlib.import_module, (self.__name__,)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
