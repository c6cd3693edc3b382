"""Tasks of lm-evaluation-harness: by name, or over a JSON-lines file of one's own, which needs no network.

lm-eval is an extra (`pip install 'prunus[evaluate]'`), slow to import, and imported only when tasks are run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib.util
import io
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunus.errors import BadData, BadRecipe, PrunusError, one_line
from prunus.evaluate import evaluation_mode

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

INSTALL = "pip install 'prunus[evaluate]'"
SEED = 1234  # lm-eval's own default, so that few-shot examples are the same as from its command line
TEMPLATES = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class LocalTask:
    """Multiple choice over a JSON-lines file: which answer has the highest log-likelihood after the query.

    Attributes:
        name: of the task in the results.
        file: one JSON object a line; all rows have the same fields.
        query: jinja template over the row's fields, such as "{{activity_label}}: {{ctx}}"; may be empty.
        choices: the field that holds the list of answers, or several fields with one answer each.
        gold: the field that holds the right answer (its index or its text), or the same index for every row.
    """

    name: str
    file: Path
    query: str
    choices: str | tuple[str, ...]
    gold: str | int


def local_task_from_dict(values: Mapping[str, Any], *, folder: Path = Path()) -> LocalTask:
    """A LocalTask from plain data, such as a recipe's; a relative file is looked for in `folder`.

    Raises:
        BadRecipe: unknown or missing keys, wrong types, no such file, or a first row that does not fit; all at once.
    """
    known = [field.name for field in dataclasses.fields(LocalTask)]
    mistakes = [f"unknown key {key!r}{_suggestion(key, known)}" for key in values if key not in known]
    mistakes += [f"{key!r} is missing" for key in known if key not in values]
    mistakes += [
        f"{key!r} must be text" for key in ("name", "file", "query") if not isinstance(values.get(key, ""), str | Path)
    ]
    if not _is_field_or_fields(values.get("choices", "")):
        mistakes.append("'choices' must be a field's name or a list of fields' names")
    if not isinstance(values.get("gold", 0), str | int):
        mistakes.append("'gold' must be a field's name or an index")
    if mistakes:
        raise BadRecipe("\n".join(f"task {values.get('name', '?')}: {mistake}" for mistake in mistakes))
    choices = values["choices"]
    task = LocalTask(
        name=values["name"],
        file=folder / values["file"],
        query=values["query"],
        choices=choices if isinstance(choices, str) else tuple(choices),
        gold=values["gold"],
    )
    check(task)
    return task


def from_recipe(entry: Any) -> str | LocalTask:
    """A task as a recipe names it, or describes it. Raises as `local_task_from_dict`."""
    return entry if isinstance(entry, str) else local_task_from_dict(entry.model_dump())


def check(task: LocalTask) -> None:
    """Try the task on the first row of its file.

    Raises:
        BadRecipe: no such file, not JSON lines, or a field that the row lacks; all at once.
    """
    row = _first_row(task)
    fields = [task.choices] if isinstance(task.choices, str) else list(task.choices)
    fields += [task.gold] if isinstance(task.gold, str) else []
    mistakes = [
        f"the first row has no field {field!r}{_suggestion(field, row)}" for field in fields if field not in row
    ]
    try:
        TEMPLATES.from_string(task.query).render(row)
    except Exception as error:  # a template may do anything with a row
        mistakes.append(f"query {task.query!r}: {error}; the first row's fields are {', '.join(row)}")
    if mistakes:
        raise BadRecipe("\n".join(f"task {task.name}: {mistake} ({task.file})" for mistake in mistakes))
    gold_index(task, row)


def answers(task: LocalTask, row: Mapping[str, Any]) -> list[str]:
    """The row's choices as text."""
    found = row[task.choices] if isinstance(task.choices, str) else [row[field] for field in task.choices]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(answer, str) and answer for answer in found):
        raise BadRecipe(
            f"task {task.name}: choices {task.choices!r} must give a list of two texts or more, none empty, "
            f"not {found!r} ({task.file})"
        )
    return found


def gold_index(task: LocalTask, row: Mapping[str, Any]) -> int:
    """Index of the right answer among the row's choices.

    Raises:
        BadRecipe: the gold is neither a valid index nor one of the answers, or both, and of two answers.
    """
    choices = answers(task, row)
    gold = row[task.gold] if isinstance(task.gold, str) else task.gold
    found = {choices.index(gold)} if gold in choices else set()
    if str(gold).isdecimal() and int(gold) < len(choices):
        found.add(int(gold))
    if len(found) == 1:
        return found.pop()
    if found:
        raise BadRecipe(
            f"task {task.name}: gold {gold!r} is one of the answers {choices!r} and the index of another; write the "
            f"index as a number, without quotes ({task.file})"
        )
    raise BadRecipe(
        f"task {task.name}: gold {gold!r} is neither one of the answers {choices!r} nor an index from 0 to "
        f"{len(choices) - 1} ({task.file})"
    )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | LocalTask],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Run lm-eval's tasks (each with its own few-shot setting) and local ones (zero-shot).

    Args:
        model: a causal language model.
        tasks: names that lm-eval knows (tasks, groups or tags), and local tasks.
        limit: rows of each task at most. Of a local task, a random sample (the same each time); of a named one, the
            first rows.
        batch_size: sequences per forward pass.
    Returns:
        task → metric → value, such as {"arc_easy": {"acc": …, "acc_stderr": …, "acc_norm": …, "acc_norm_stderr": …}}.
        A group also lists its members.
    Raises:
        PrunusError: lm-eval is not installed.
        BadRecipe: lm-eval knows no such task, a local task does not fit its file, or a name is given twice.
        BadData: the data of a named task is neither cached nor reachable.
    """
    check_all(tasks)
    if not tasks:
        return {}
    with _quiet(), _seeded(), evaluation_mode([model]), tempfile.TemporaryDirectory() as cache:
        return _run(model, tokenizer, tasks, limit, batch_size, cache)


def check_all(tasks: Sequence[str | LocalTask]) -> None:
    """What can be known of tasks before they are run. Raises PrunusError and BadRecipe as `run_tasks`."""
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise PrunusError(f"evaluation tasks are run by lm-eval, which is not installed; {INSTALL}")
    _check_names(tasks)
    for task in tasks:
        if isinstance(task, LocalTask):
            check(task)
    with _quiet():
        _manager([task for task in tasks if isinstance(task, str)])


def error_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str | LocalTask, *, limit: int | None = None
) -> float:
    """Share of a task's answers that are wrong, 1 − acc. Raises as `run_tasks`, and BadRecipe of a task without acc."""
    name = task.name if isinstance(task, LocalTask) else task
    found = run_tasks(model, tokenizer, [task], limit=limit)[name]
    if "acc" not in found:
        raise BadRecipe(f"task {name} has no accuracy, only {', '.join(found)}; choose a task of multiple choice")
    return 1 - found["acc"]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | LocalTask],
    limit: int | None,
    batch_size: int,
    cache: str,
) -> dict[str, dict[str, float]]:
    """`lm_eval.simple_evaluate` without the survey of the machine, which takes seconds and prints git's complaints."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = _manager([task for task in tasks if isinstance(task, str)])
    local = {task: _harness_task(task, cache) for task in tasks if isinstance(task, LocalTask)}
    # a copy of the tokenizer, because lm-eval gives it a padding token; float32, because bfloat16 rounds log p to 1/16
    adapter = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype=torch.float32)
    try:
        loaded = manager.load([local[task] if isinstance(task, LocalTask) else task for task in tasks])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(SEED)
        found = lm_eval.evaluate(adapter, loaded, limit=limit, log_samples=False)
    except (ConnectionError, FileNotFoundError) as error:
        raise BadData(
            f"the data of a task could not be had ({one_line(error)}). lm-eval's named tasks download "
            "theirs; run once with a network, or give a task over a local file."
        ) from error
    except ImportError as error:
        raise PrunusError(f"a task needs a package that is not installed ({one_line(error)})") from error
    return {name: _metrics(values) for name, values in found["results"].items()}


def _harness_task(task: LocalTask, cache: str) -> ConfigurableTask:
    """The task as lm-eval's own type; `cache` is a folder for the file's Arrow form.

    Functions rather than lm-eval's templates, which turn a query such as "12" into the index 12.
    """
    from datasets.exceptions import DatasetGenerationError
    from lm_eval.api.task import ConfigurableTask

    template = TEMPLATES.from_string(task.query)
    config = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(task.file.resolve())},
            "cache_dir": cache,
            "keep_in_memory": True,
        },
        "test_split": "test",
        "process_docs": lambda rows: rows.shuffle(seed=0, keep_in_memory=True),  # so that a limit takes a fair sample
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: template.render(row),
        "doc_to_choice": lambda row: answers(task, row),
        "doc_to_target": lambda row: gold_index(task, row),
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
    try:
        return ConfigurableTask(config=config)
    except DatasetGenerationError as error:
        cause = one_line(error.__cause__ or error)
        raise BadRecipe(
            f"task {task.name}: {task.file} cannot be read as a table ({cause}); each line must be a JSON object with "
            "the same fields, and a field must hold the same type in all"
        ) from error


def _check_names(tasks: Sequence[str | LocalTask]) -> None:
    names = [task.name if isinstance(task, LocalTask) else task for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadRecipe(f"tasks: {', '.join(twice)} given twice; the results are told apart by name")


def _manager(names: Sequence[str]) -> TaskManager:
    """lm-eval's tasks, which know these names; none of its own where no name is asked for."""
    manager = _index(bool(names))
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise BadRecipe(
            "\n".join(f"lm-eval knows no task {name!r}{_suggestion(name, manager.all_tasks)}" for name in unknown)
        )
    return manager


@functools.cache
def _index(own: bool) -> TaskManager:
    """Reading lm-eval's own tasks takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` → `acc`; a filter other than none stays in the name; what is not a number is left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }


def _first_row(task: LocalTask) -> dict[str, Any]:
    if not task.file.is_file():
        raise BadRecipe(f"task {task.name}: no such file: {task.file}")
    try:
        with task.file.open(encoding="utf-8") as lines:
            line = next((line for line in lines if line.strip()), "")
        row = json.loads(line)
    except ValueError as error:
        raise BadRecipe(f"task {task.name}: {task.file} is not JSON lines (one object a line): {error}") from error
    if not isinstance(row, dict):
        raise BadRecipe(f"task {task.name}: each line of {task.file} must be a JSON object with named fields")
    return row


def _is_field_or_fields(choices: Any) -> bool:
    is_list = isinstance(choices, list | tuple)
    return isinstance(choices, str) or (is_list and all(isinstance(field, str) for field in choices))


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The seeds of `lm_eval.simple_evaluate`; the global generators go on from where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Errors only from lm-eval's loggers; its bars and prints go to the terminal, or nowhere if there is none."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            yield
    finally:
        logger.setLevel(level)
