"""What a run writes, known before it: names and bytes."""

from __future__ import annotations

from collections.abc import Sequence

from prunus.checkpoint import Checkpoint
from prunus.recipe import STAGES, Recipe
from prunus.run import BASELINE, LARGER, OUTPUTS, TEACHER_CACHE
from prunus.teacher import bytes_per_token


def reaches(recipe: Recipe, stage: str) -> bool:
    """Whether a run of the recipe does this stage."""
    return STAGES.index(stage) <= STAGES.index(recipe.stop_after)


def files(recipe: Recipe, *, in_rounds: bool) -> list[str]:
    """Names in the run folder, of what the stages leave behind.

    Args:
        in_rounds: a larger student comes first.
    """
    beside = {
        TEACHER_CACHE: recipe.distill.teacher_cache is not None and reaches(recipe, "distill"),
        BASELINE: recipe.baseline and reaches(recipe, "distill"),
    }
    stages = (name for stage in STAGES if reaches(recipe, stage) for name in OUTPUTS[stage])
    return [*([LARGER] if in_rounds else []), *stages, *(name for name, there in beside.items() if there)]


def disk_bytes(recipe: Recipe, teacher: Checkpoint, parameters: Sequence[int], *, itemsize: int) -> int:
    """Of the text, the students and the teacher's cache; all else is small. Where the text is shorter, it is less.

    Args:
        parameters: of the student of each round; of the earlier ones both checkpoints stay, as cut and as distilled.
        itemsize: bytes of a value that is stored.
    """
    distills = reaches(recipe, "distill")
    of_last = reaches(recipe, "prune") + distills * (1 + recipe.baseline)
    *earlier, last = parameters
    return (
        itemsize * (2 * sum(earlier) + of_last * last)
        + _text_bytes(recipe, teacher)
        + (_cache_bytes(recipe, teacher) if distills or earlier else 0)
    )


def _train_tokens(recipe: Recipe) -> int:
    """Beside what is trained on there is what is measured and repaired on."""
    return (recipe.distill.tokens or 0) + max(recipe.measure.tokens, recipe.prune.tokens)


def _text_bytes(recipe: Recipe, teacher: Checkpoint) -> int:
    """See `text.Blocks`; the runs of larger students link to the same files."""
    block_size = recipe.data.block_size
    per_token = sum(2 if largest <= 2**16 else 4 for largest in (teacher.architecture.vocab, block_size))
    blocks = sum(tokens // block_size for tokens in (_train_tokens(recipe), recipe.data.heldout_tokens))
    return blocks * (block_size * per_token + 8)


def _cache_bytes(recipe: Recipe, teacher: Checkpoint) -> int:
    """Of all of the training text, whatever of it is trained on."""
    options = recipe.distill
    if options.teacher_cache is None:
        return 0
    hidden, tokens = teacher.architecture.hidden, _train_tokens(recipe)
    return tokens * bytes_per_token(options.teacher_cache, per_token=options.cache_per_token, hidden=hidden)
