"""Text of a benchmark: tokenised once into its folder."""

from pathlib import Path

import prunus as pr
from prunus.documents import documents, shuffled
from prunus.text import Blocks, load_blocks

BLOCK_SIZE = 512


def tokenised(file: str, teacher: pr.Checkpoint, tokens: int, to: Path) -> Blocks:
    """The beginning of a file's documents, in an order drawn once and for all."""
    if to.exists():
        return load_blocks(to)
    docs = shuffled(documents(file), seed=0)
    return pr.tokenise(docs, teacher.tokenizer(), block_size=BLOCK_SIZE, max_tokens=tokens, to=to, label=file)
