"""Whether a student can learn from a teacher: an id must stand for the same token in both."""

from __future__ import annotations

from prunus.checkpoint import Checkpoint
from prunus.errors import BadCheckpoint, BadRecipe
from prunus.text import Blocks

SAME = 0.99
"""Share of their tokens that both must have: versions of one tokenizer rename some special ones."""
PADDING = 1024
"""Rows that one embedding may have more than the other: both are padded to what is fast to multiply."""


def check_same_tokens(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse two models of other tokens.

    Raises:
        BadCheckpoint: says how many are the same.
    """
    pair = (student, teacher)
    mine, theirs = ({number: token for token, number in each.tokenizer().get_vocab().items()} for each in pair)
    same, tokens = sum(theirs.get(number) == token for number, token in mine.items()), max(len(mine), len(theirs))
    if same < SAME * tokens:
        raise BadCheckpoint(
            f"{student.name} and {teacher.name}: {same:,} of {tokens:,} ids stand for the same token in both; a "
            "student needs its teacher's tokenizer"
        )
    shared_rows(*(each.architecture.vocab for each in pair))


def check_padding(student: Checkpoint, teacher: Checkpoint, *, cache: str | None, on_policy: bool) -> None:
    """Refuse for two embeddings of other lengths what needs an id of one in the other.

    Args:
        cache: kind of the teacher's cache, if there is one.
        on_policy: whether the student writes text itself.
    Raises:
        BadRecipe: names the options.
    """
    rows = [each.architecture.vocab for each in (student, teacher)]
    by_ids = [f"teacher_cache={cache}"] if cache in ("samples", "top_k") else []
    by_ids += ["on_policy_share"] if on_policy else []
    if rows[0] != rows[1] and by_ids:
        raise BadRecipe(
            f"{' and '.join(by_ids)}: the embeddings of student and teacher have {rows[0]:,} and {rows[1]:,} rows, and "
            "such an id could be missing in one. The teacher itself, or a cache of its hidden states, is compared over "
            "the ids that both have."
        )


def check_ids(blocks: Blocks, *models: Checkpoint) -> None:
    """Refuse text with an id that one of the models has no row for, as it may be with the tokens that are not the same.

    Raises:
        BadCheckpoint: names the id.
    """
    largest = int(blocks.tokens.max())
    for model in models:
        if largest >= model.architecture.vocab:
            raise BadCheckpoint(
                f"{model.name}: the text has the id {largest:,}, but the embedding {model.architecture.vocab:,} rows; "
                "give a text without that token, or models of the same tokenizer"
            )


def shared_rows(student: int, teacher: int) -> int:
    """How many ids the heads of two models have in common, from the rows of each.

    Raises:
        BadCheckpoint: one has far more; then it has other tokens.
    """
    if abs(student - teacher) > PADDING:
        raise BadCheckpoint(
            f"the student's head has {student:,} tokens, the teacher's {teacher:,}; a divergence compares "
            "distributions over the same tokens"
        )
    return min(student, teacher)
