"""5-evaluation.json: the teacher and every student of a run, on the same held-out text, prompts and tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from prunus import console, hardware, memory
from prunus.evaluate import PROMPTS, Speed, continuations, quality, speed, states
from prunus.head import Dense
from prunus.prune import build, cut
from prunus.recipe import Prune
from prunus.run import Run
from prunus.tasks import from_recipe, run_tasks

LABELS = {
    "teacher": "Teacher",
    "cut": "Cut, as sliced",
    "repaired": "Cut and repaired",
    "distilled": "Distilled",
    "baseline": "Same shape from random init",
}


def compare(run: Run) -> dict[str, Any]:
    """What the file holds; nothing was chosen by its text. One student at a time is in memory, beside the teacher where
    both fit, and else after it."""
    options, tokenizer, compared = run.recipe.evaluate, run.teacher.tokenizer(), _compared(run)
    prompts, tasks = tuple(options.prompts or PROMPTS), [from_recipe(task) for task in options.tasks]
    student = "distilled" if "distilled" in compared else "repaired"
    together = _fit(compared["teacher"], compared[student])
    loaded = {"teacher": compared["teacher"].open()}
    with console.bar("held-out text: teacher", unit="blocks") as step:
        reference = states(loaded["teacher"], run.test, progress=step)
    if not together:
        reference = _by_itself(reference)
    rows: list[dict[str, Any]] = []
    speeds: dict[str, Speed] = {}
    texts: dict[str, list[str]] = {}
    for key, entry in compared.items():
        if key not in loaded:
            loaded[key] = entry.open()
        with console.bar(f"held-out text: {key}", unit="blocks") as step:
            measured = quality(
                reference if key == "teacher" else loaded[key], run.test, teacher=reference, progress=step
            )
        if key != "cut":
            texts[key] = continuations(loaded[key], tokenizer, prompts)
        if options.speed and (key == student or (key == "teacher" and not together)):
            speeds |= speed(loaded)
        judged = key in ("teacher", student, "baseline") and tasks
        rows.append(
            {
                "key": key,
                "label": label(key, run.recipe.prune),
                "parameters": entry.parameters,
                "bytes": entry.bytes,
                **asdict(measured),
                "tasks": run_tasks(loaded[key], tokenizer, tasks, limit=options.limit) if judged else {},
            }
        )
        if key != "teacher" or not together:
            del loaded[key]
    return {
        "tokens": run.test.num_tokens,
        "models": [row | (asdict(speeds[row["key"]]) if row["key"] in speeds else {}) for row in rows],
        "samples": [
            {"prompt": prompt, "continuations": {key: found[at] for key, found in texts.items()}}
            for at, prompt in enumerate(prompts)
        ],
    }


def label(key: str, options: Prune) -> str:
    """What a model is called. Where nothing was to be repaired, the student is what the cut alone made."""
    if key == "repaired" and not options.repair:
        return "Cut, norms corrected" if options.norm_correction else "Cut"
    return LABELS[key]


class _Model(NamedTuple):
    """A model of the table.

    Attributes:
        open: brings it into memory.
        parameters, bytes: of its checkpoint.
    """

    open: Callable[[], PreTrainedModel]
    parameters: int
    bytes: int


def _fit(*models: _Model) -> bool:
    """Whether there is memory for all of these at once."""
    need = hardware.compute_dtype().itemsize * sum(model.parameters for model in models)
    return need <= memory.ROOM * hardware.free_memory()


def _by_itself(known: Dense) -> Dense:
    """The same when the model is gone, of which it holds the head."""
    weight_VD, bias_V = known.head.weight_VD.detach().clone(), known.head.bias_V
    bias_V = None if bias_V is None else bias_V.detach().clone()
    return replace(known, head=replace(known.head, weight_VD=weight_VD, bias_V=bias_V))


def _compared(run: Run) -> dict[str, _Model]:
    """In the order of the table."""
    checkpoints = {"teacher": run.teacher, "repaired": run.pruned}
    if run.finished("distill"):
        checkpoints["distilled"] = run.distilled
    if run.baseline is not None:
        checkpoints["baseline"] = run.baseline
    dtype, device = hardware.compute_dtype(), hardware.device()
    models = {
        key: _Model(partial(checkpoint.module, dtype, device), checkpoint.parameters, checkpoint.bytes)
        for key, checkpoint in checkpoints.items()
    }
    if run.recipe.prune.repair or run.recipe.prune.norm_correction:
        models["cut"] = models["repaired"]._replace(open=partial(_as_sliced, run, dtype, device))
    return {key: models[key] for key in LABELS if key in models}


def _as_sliced(run: Run, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    plain = cut(run.parent, run.scores, run.pruned.architecture, norm_correction=False)
    return hardware.place(build(plain, dtype), device=device)
