"""Candidates trained a little, the worse half dropped, and so on: rankings before any training mislead.

Minitron (arXiv:2407.14679) trains all of its candidates equally long; successive halving (arXiv:1502.07943)
spends most on those that are still in question. The teacher runs over each stretch of text once, for all of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prunus import hardware, side_by_side
from prunus.checkpoint import Checkpoint, load
from prunus.distill import distill
from prunus.evaluate import quality
from prunus.files import atomic_file
from prunus.schedule import Settings
from prunus.search import Standing
from prunus.teacher import describe, open_cache, write_cache
from prunus.text import Blocks

STANDINGS = "standings.json"


def rounds(candidates: int, tokens: int) -> list[tuple[int, int]]:
    """Of each round how many candidates take part, and the tokens that each is trained on, in all, at its end.

    The number halves from round to round, down to two, and the tokens double.
    """
    counts = [candidates]
    while counts[-1] > 2:
        counts.append(-(-counts[-1] // 2))
    return [(count, tokens // 2 ** (len(counts) - 1 - place)) for place, count in enumerate(counts)]


def tournament(
    teacher: Checkpoint,
    candidates: Mapping[str, Checkpoint],
    blocks: Blocks,
    heldout: Blocks,
    *,
    to: Path,
    tokens: int,
    settings: Settings | None = None,
    gradient_checkpointing: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Standing]:
    """Name → standing, best first.

    Args:
        candidates: cut and repaired students.
        blocks: training text; each round goes on where the one before it ended.
        heldout: what they are ranked by.
        to: folder for the cache, the students and the standings so far. A killed tournament goes on from there; at the
            end the standings alone are left.
        tokens: that the finalists are trained on.
        settings: of the training, as far as samples of the teacher can teach: always forward KL on the text. The
            learning rate stays at its peak, because every round goes on with the next.
        gradient_checkpointing: see `distill.distill`.
        workers: candidates that are trained side by side, on Ray.
        progress: called with the tokens trained on, of all candidates together, and in all.
    """
    settings = _of_samples(settings or Settings())
    plan = rounds(len(candidates), tokens)
    starts = [0, *(end for _, end in plan)]
    total = sum(count * (end - start) for (count, end), start in zip(plan, starts, strict=False))
    book = _Book(to, _key(teacher, candidates, blocks, heldout, tokens, settings))
    students, done = {name: model.folder for name, model in candidates.items()}, 0
    for name, model in candidates.items():
        if name not in book.standings:
            book.note(name, 0, _loss(model, heldout))
    for number, (count, end) in enumerate(plan):
        text = _between(blocks, starts[number], end)
        batch = settings.batch_tokens and min(settings.batch_tokens, text.num_tokens)
        own = replace(settings, tokens=text.num_tokens, batch_tokens=batch)
        names = book.best(number)[:count]
        folders = {name: to / f"{number + 1}-{name}" for name in names}
        waiting = [name for name in names if len(book.standings[name].losses) == number + 1]
        done += (count - len(waiting)) * (end - starts[number])  # of a killed tournament
        if waiting:
            cache = to / f"{number + 1}-cache"
            write_cache(teacher, text, describe(teacher, text), to=cache)
            lessons = {
                name: _Lesson(students[name], folders[name], cache, text, heldout, own, gradient_checkpointing)
                for name in waiting
            }
            for name, loss in side_by_side.each(_taught, lessons, workers=workers):
                book.note(name, end, loss)
                done += end - starts[number]
                progress(done, total)
        students |= folders
    for left in (path for path in to.iterdir() if path.is_dir()):
        shutil.rmtree(left)
    return dict(sorted(book.standings.items(), key=lambda item: item[1].rank))


def _of_samples(settings: Settings) -> Settings:
    """Without what needs the teacher itself, and without an end of the training."""
    return replace(
        settings,
        schedule="constant",
        divergence="forward_kl",
        temperature=1.0,
        hidden_loss=None,
        on_policy_share=0.0,
        evaluate_every=0,
        patience=0,
    )


class _Book:
    """The standings so far, in memory and on disk; those of another tournament are thrown away with all it left."""

    def __init__(self, to: Path, key: str) -> None:
        self.file, self.key = to / STANDINGS, key
        if self.file.is_file() and json.loads(self.file.read_text())["key"] != key:
            shutil.rmtree(to)
        to.mkdir(parents=True, exist_ok=True)
        found = json.loads(self.file.read_text())["standings"] if self.file.is_file() else {}
        self.standings = {name: Standing(**values) for name, values in found.items()}

    def best(self, number: int) -> list[str]:
        """Who is ahead after a round, of those that took part in it."""
        there = [name for name, standing in self.standings.items() if len(standing.losses) > number]
        return sorted(there, key=lambda name: (self.standings[name].losses[number], name))

    def note(self, name: str, tokens: int, loss: float) -> None:
        before = self.standings.get(name, Standing())
        self.standings[name] = Standing([*before.tokens, tokens], [*before.losses, loss])
        found = {name: asdict(standing) for name, standing in self.standings.items()}
        with atomic_file(self.file) as partial:
            partial.write_text(json.dumps({"key": self.key, "standings": found}, indent=1))


def _key(
    teacher: Checkpoint,
    candidates: Mapping[str, Checkpoint],
    blocks: Blocks,
    heldout: Blocks,
    tokens: int,
    settings: Settings,
) -> str:
    """Names what a tournament's results depend on."""
    models = {name: model.fingerprint for name, model in candidates.items()}
    texts = [blocks.fingerprint, heldout.fingerprint]
    parts = json.dumps([teacher.fingerprint, models, texts, tokens, asdict(settings)])
    return hashlib.sha256(parts.encode()).hexdigest()


@dataclass(frozen=True)
class _Lesson:
    """What a student has to learn in a round, so that any process can teach it.

    Attributes:
        student, to: folders of the model before and after.
        cache: folder of what the teacher says of the text.
    """

    student: Path
    to: Path
    cache: Path
    text: Blocks
    heldout: Blocks
    settings: Settings
    gradient_checkpointing: bool


def _taught(lesson: _Lesson) -> float:
    """Loss on the held-out text after the lesson. A killed tournament may not have come to measure it."""
    if not lesson.to.is_dir():
        cache = open_cache(lesson.cache)
        distill(
            load(lesson.student),
            cache,
            lesson.text,
            to=lesson.to,
            settings=lesson.settings,
            gradient_checkpointing=lesson.gradient_checkpointing,
        )
    return _loss(load(lesson.to), lesson.heldout)


def _between(blocks: Blocks, start: int, end: int) -> Blocks:
    """The text of these tokens; from its beginning again where it is too short."""
    first, last = start // blocks.block_size, max(end // blocks.block_size, start // blocks.block_size + 1)
    return blocks.select([place % len(blocks) for place in range(first, last)])


def _loss(model: Checkpoint, heldout: Blocks) -> float:
    return quality(model.module(hardware.compute_dtype(), hardware.device()), heldout).loss
