"""Distil or evaluate any model, without a run directory."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunus import console, hardware, hidden, parallel, vocabulary
from prunus.budget import parse_quantity
from prunus.checkpoint import Checkpoint, load, verify_weights
from prunus.distill import Progress
from prunus.distill import distill as train
from prunus.documents import chat_template, check_ends, documents, shuffled
from prunus.errors import BadOutput, BadRecipe
from prunus.evaluate import quality, speed
from prunus.recipe import Distill, Evaluate, parse_section
from prunus.schedule import Settings
from prunus.shared_tokens import check_ids, check_padding, check_same_tokens
from prunus.tasks import check_all, from_recipe, run_tasks
from prunus.teacher import Cache, describe, open_cache, write_cache
from prunus.text import Blocks, tokenise
from prunus.trackers import check as check_trackers
from prunus.trackers import tracked

BLOCK_SIZE = 512
HELDOUT_TOKENS = 65536
SPELLING_RATE = 5e-5
"""Learning rate after a cut of the vocabulary: the model itself is whole."""


def distill(
    student: str,
    teacher: str,
    data: str,
    *,
    heldout: str | None,
    tokens: str | None,
    settings: Mapping[str, Any],
    to: Path,
) -> Path:
    """Distil `teacher` into `student` on the text `data`, and write the result to `to`.

    Args:
        heldout: text for `evaluate_every`.
        settings: keys of the recipe's section `distill`. A teacher's cache is written beside `to`, and stays for other
            students of the same teacher and text.
    """
    to = to.absolute()
    if to.exists() and any(to.iterdir()):
        raise BadOutput(f"{to} is not empty; give a new folder with --to")
    options = parse_section(Distill, {**settings, **({"tokens": tokens} if tokens else {})}, source="command line")
    if options.evaluate_every and heldout is None:
        raise BadRecipe("evaluate_every measures on held-out text; give some with --heldout")
    check_ends(data, options.tokens)
    check_trackers(options.trackers)
    learner, source = _opened(student), _opened(teacher)
    check_same_tokens(learner, source)
    check_padding(learner, source, cache=options.teacher_cache, on_policy=options.on_policy_share > 0)
    training = Settings(**options.hyperparameters())
    pairs = hidden.pairs(learner, source, count=training.hidden_layers) if training.hidden_loss else None
    with tempfile.TemporaryDirectory() as folder:
        blocks = _blocks(data, [source, learner], options.tokens, Path(folder))
        validation = _blocks(heldout, [source, learner], HELDOUT_TOKENS, Path(folder) / "heldout") if heldout else None
        for text in filter(None, [blocks, validation]):
            check_ids(text, learner, source)
        kind = options.teacher_cache
        kept = source if kind is None else _cached(source, blocks, kind, options, to)
        with console.bar("student", unit="tokens") as step, tracked(options.trackers, to.name) as track:

            def show(at: Progress) -> None:
                step(at.tokens, at.total_tokens, f"loss {at.loss:.3f}")
                track(at)

            written = train(
                learner,
                kept,
                blocks,
                to=to,
                settings=training,
                pairs=pairs,
                validation=validation,
                gradient_checkpointing=options.gradient_checkpointing,
                compiled=options.compile,
                checkpoint_seconds=options.checkpoint_seconds,
                progress=show,
            )
    return written.folder


def trim_vocabulary(
    model: str, data: str, *, size: str, most_documents: int, tokens: str | None, to: Path
) -> dict[str, Any]:
    """Cut a model's vocabulary to the tokens that the text `data` needs, and write the result to `to`.

    Args:
        tokens: of the text, on which the model then learns its new spelling; None for no training.
    Returns:
        folder, sizes of vocabulary and model before and after, and the share of the text's tokens that stay.
    """
    to = to.absolute()
    if to.exists() and any(to.iterdir()):
        raise BadOutput(f"{to} is not empty; give a new folder with --to")
    wanted, training = _quantity("size", size), _quantity("tokens", tokens) if tokens else None
    checkpoint = _opened(model)
    tokenizer = checkpoint.tokenizer()
    with console.bar("tokens", unit="documents") as step:
        some = itertools.islice(documents(data, render=chat_template(tokenizer)), most_documents)
        counts = vocabulary.count_tokens(tokenizer, some, progress=lambda done: step(done, most_documents))
    named = vocabulary.named_ids(checkpoint)
    chosen = vocabulary.choose(tokenizer, counts, wanted, embedded=checkpoint.architecture.vocab, named=named)
    if training is None:
        written = vocabulary.trim(checkpoint, chosen, to=to)
    else:
        written = _respelled(vocabulary.trim(checkpoint, chosen, to=_before_training(to)), data, training, to)
    return {
        "folder": str(written.folder),
        "vocabulary": [checkpoint.architecture.vocab, written.architecture.vocab],
        "parameters": [checkpoint.parameters, written.parameters],
        "coverage": chosen.coverage,
    }


def _before_training(to: Path) -> Path:
    return to.with_name(f".{to.name}.trimmed")


def _respelled(trimmed: Checkpoint, data: str, tokens: int, to: Path) -> Checkpoint:
    """Trained on the text itself: a teacher of other tokens says nothing of how to spell. The untrained model goes
    whatever happens; a killed training goes on from the same bits, trimmed anew."""
    try:
        with tempfile.TemporaryDirectory() as folder, console.bar("new spelling", unit="tokens") as step:
            return train(
                trimmed,
                None,
                _blocks(data, [trimmed], tokens, Path(folder)),
                to=to,
                settings=Settings(tokens=tokens, learning_rate=SPELLING_RATE),
                progress=lambda at: step(at.tokens, at.total_tokens, f"loss {at.loss:.3f}"),
            )
    finally:
        shutil.rmtree(trimmed.folder)


def _quantity(option: str, value: str) -> int:
    try:
        return int(parse_quantity(value))
    except ValueError as error:
        raise BadRecipe(f"--{option}: {error}") from error


def show_vocabulary(result: Mapping[str, Any]) -> None:
    """Print the result of `trim_vocabulary` for a reader."""
    out = Console(highlight=False, markup=False)
    for name in ("vocabulary", "parameters"):
        before, after = result[name]
        out.print(f"{name}: {before:,} → {after:,}")
    out.print(f"{result['coverage']:.2%} of the text's tokens stay; the others are spelled by smaller ones.")
    out.print(f"Wrote {result['folder']}", soft_wrap=True)


def _cached(teacher: Checkpoint, blocks: Blocks, kind: str, options: Distill, to: Path) -> Cache:
    wanted = describe(
        teacher,
        blocks,
        kind=kind,
        per_token=options.cache_per_token,
        temperature=options.temperature,
        seed=options.seed,
    )
    folder = to.with_name(f"{to.name}-teacher-cache")
    with console.bar("teacher cache", unit="tokens") as step:
        parallel.first_alone(lambda: write_cache(teacher, blocks, wanted, to=folder, progress=step))
    return open_cache(folder, **asdict(wanted))


def evaluate(
    model: str, *, teacher: str | None, data: str | None, tokens: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Quality on the text `data`, tasks and speed of one model.

    Args:
        settings: keys of the recipe's section `evaluate`.
    """
    options, num_tokens = parse_section(Evaluate, settings, source="command line"), _quantity("tokens", tokens)
    if options.prompts is not None:
        raise BadRecipe("prompts: sample texts are part of a run's report; a model alone is only measured")
    if teacher is not None and data is None:
        raise BadRecipe("--teacher: models are compared on text; give some with --data")
    tasks = [from_recipe(task) for task in options.tasks]
    check_all(tasks)
    checkpoint, compared = _opened(model), _opened(teacher) if teacher else None
    if compared:
        check_same_tokens(checkpoint, compared)
    dtype, device = hardware.compute_dtype(), hardware.device()
    module = checkpoint.module(dtype, device)
    result: dict[str, Any] = {"model": model, "parameters": checkpoint.parameters, "bytes": checkpoint.bytes}
    if data is not None:
        with tempfile.TemporaryDirectory() as folder, console.bar("text", unit="blocks") as step:
            judged = [checkpoint, compared] if compared else [checkpoint]
            blocks = _blocks(data, judged, num_tokens, Path(folder))
            check_ids(blocks, *judged)
            reference = compared.module(dtype, device) if compared else None
            result |= asdict(quality(module, blocks, teacher=reference, progress=step))
    if options.speed:
        result |= asdict(speed({"model": module})["model"])
    scored = run_tasks(module, checkpoint.tokenizer(), tasks, limit=options.limit) if tasks else {}
    return result | {"tasks": scored}


def show(result: Mapping[str, Any]) -> None:
    """Print an evaluation for a reader."""
    table = Table("", "", box=None, show_header=False)
    for key, value in result.items():
        if key != "tasks" and value is not None:
            table.add_row(key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value}")
    for task, metrics in result["tasks"].items():
        table.add_row(task, "  ".join(f"{metric} {value:.3f}" for metric, value in metrics.items()))
    Console(highlight=False, markup=False).print(table)


def _opened(name: str) -> Checkpoint:
    checkpoint = load(name)
    verify_weights(checkpoint)
    return checkpoint


def _blocks(data: str, models: list[Checkpoint], tokens: int | None, folder: Path) -> Blocks:
    """Text in the tokens of the first, in blocks that all can read."""
    tokenizer, known = models[0].tokenizer(), min(model.positions for model in models)
    docs = shuffled(documents(data, render=chat_template(tokenizer)), seed=0)
    to = folder / "text"
    return tokenise(docs, tokenizer, block_size=min(BLOCK_SIZE, known), max_tokens=tokens, to=to, label=data)
