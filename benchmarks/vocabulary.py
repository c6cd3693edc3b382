"""A vocabulary cut to an eighth: size, what it costs in perplexity per byte, and whether all text survives.

Usage: python benchmarks/vocabulary.py MODEL TEXT... --heldout FILE [--heldout FILE] [--size 32k] [--tokens 160k]
       [--whole-tokens 0] [--to FOLDER]

Tokens are counted on TEXT, which the held-out files are not part of. A trimmed model must learn to spell what it had
tokens for; --tokens are those of the last TEXT that it is trained on, by cross-entropy. The whole model is trained on
as many, or on --whole-tokens, because training on such text helps by itself. Bytes are those of the text, so models of
different tokens compare.
"""

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import prunus as pr
from prunus import hardware, vocabulary
from prunus.budget import parse_quantity
from prunus.checkpoint import Checkpoint
from prunus.documents import documents, shuffled
from prunus.schedule import Settings

STRINGS = 10_000
HELDOUT_CHARACTERS = 120_000
BLOCK_SIZE, BATCH_TOKENS = 512, 4096


def any_text(count: int) -> Iterator[str]:
    """Random strings: all scripts, emoji, bytes that happen to be UTF-8, spaces and marks, any code points."""
    draw = random.Random(0)
    scripts = [*range(0x20, 0x600), *range(0x900, 0xE00), *range(0x3040, 0x9FFF), *range(0xAC00, 0xD7A4)]
    kinds = [
        lambda: chr(draw.choice(scripts)),
        lambda: chr(draw.randrange(0x1F300, 0x1FAFF)),
        lambda: bytes(draw.randrange(256) for _ in range(3)).decode(errors="ignore"),
        lambda: draw.choice("  \n\tabc.,!▁<>"),
        lambda: chr(draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)])),
    ]
    for _ in range(count):
        kind = draw.choice(kinds)
        yield "".join(kind() for _ in range(draw.randrange(1, 40)))


def survives(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    decoded: str = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    return decoded == text


def heldout_text(file: str) -> list[str]:
    """The beginnings of documents from all over the file; of a single one, its last part."""
    docs = list(shuffled(documents(file), seed=0))
    if len(docs) == 1:
        return [docs[0][-HELDOUT_CHARACTERS:]]
    return [document[:3000] for document in docs[: HELDOUT_CHARACTERS // 3000]]


def bits_per_byte(model: Checkpoint, docs: list[str], folder: Path) -> float:
    blocks = pr.tokenise(docs, model.tokenizer(), block_size=BLOCK_SIZE, to=folder, label="held out")
    return pr.quality(model.module(hardware.compute_dtype()), blocks).bits_per_byte


def trained(model: Checkpoint, file: str, tokens: int, learning_rate: float, folder: Path) -> Checkpoint:
    """On as many tokens of the same text; a smaller vocabulary needs more of them for a document, and sees less."""
    docs = shuffled(documents(file), seed=0)
    blocks = pr.tokenise(
        docs, model.tokenizer(), block_size=BLOCK_SIZE, max_tokens=tokens, to=folder / "text", label="training"
    )
    settings = Settings(tokens=tokens, batch_tokens=BATCH_TOKENS, learning_rate=learning_rate)
    return pr.distill(model, None, blocks, to=folder / "model", settings=settings)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--heldout", action="append", required=True)
    parser.add_argument("--size", type=parse_quantity, default=32768)
    parser.add_argument("--tokens", type=parse_quantity, default=160_000)
    parser.add_argument("--whole-tokens", type=parse_quantity, help="as many as --tokens, unless said")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--to", type=Path, help="an empty folder to keep the models in; a temporary one, unless said")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(options, options.to or Path(name))


def run(options: argparse.Namespace, folder: Path) -> None:
    whole = pr.load(options.model)
    tokenizer = whole.tokenizer()
    counts: Counter[int] = Counter()
    for file in options.text:
        counts += vocabulary.count_tokens(tokenizer, documents(file))
    chosen = vocabulary.choose(tokenizer, counts, int(options.size))
    heldout = {Path(file).name: heldout_text(file) for file in options.heldout}
    trimmed = vocabulary.trim(whole, chosen, to=folder / "trimmed")
    print(
        f"{whole.architecture.vocab:,} → {trimmed.architecture.vocab:,} tokens, {whole.parameters / 1e6:.1f}M → "
        f"{trimmed.parameters / 1e6:.1f}M parameters; {chosen.coverage:.2%} of the tokens counted stay"
    )
    before, after = tokenizer, trimmed.tokenizer()
    strings = [text for text in any_text(STRINGS) if survives(before, text)]
    lost = sum(not survives(after, text) for text in strings)
    print(f"{STRINGS:,} random strings: {len(strings):,} come back from the whole tokenizer, {lost} of them not now")
    models = {"whole": whole, "trimmed": trimmed}
    tokens = {
        "whole": options.tokens if options.whole_tokens is None else options.whole_tokens,
        "trimmed": options.tokens,
    }
    models |= {
        f"{key}, trained": trained(
            models[key], options.text[-1], int(number), options.learning_rate, folder / f"{key}-trained"
        )
        for key, number in tokens.items()
        if number
    }
    for file, docs in heldout.items():
        bits = {key: bits_per_byte(model, docs, folder / f"{key}-{file}") for key, model in models.items()}
        for key, value in bits.items():
            print(
                f"{file}: {key}: {value:.4f} bits a byte, perplexity per byte {2**value:.4f}, "
                f"{2 ** (value - bits['whole']) - 1:+.2%} of the whole"
            )


if __name__ == "__main__":
    main()
