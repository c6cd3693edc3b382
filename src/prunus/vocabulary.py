"""A smaller vocabulary: the tokens that a text needs, with tokenizer, embedding and head cut alike.

Any text still encodes and decodes to itself: the bytes (or the characters that stand for them) always stay, and a token
stays only with all that it is merged from. Text whose tokens all stay is encoded as before, under new ids.

V ids of the teacher.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prunus import dims, pieces, weights
from prunus.checkpoint import Checkpoint, save
from prunus.errors import BadRecipe, UnsupportedModel

PLACEHOLDER = re.compile(r"unused|reserved|<extra_id_|<\|extra_|\[pad\d")
"""Added tokens that a tokenizer keeps in reserve; they stay only where a text has them."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
"""What SentencePiece writes for a space; spelled by bytes it would stay what it looks like."""
ID_KEY = re.compile(r"(_token|^token)_(id|ids|index)$")
"""Config keys whose values are ids."""
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
GENERATION = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
"""The vocabulary as SentencePiece stores it, which llama.cpp reads instead of tokenizer.json where it is there."""
STALE_FILES = (
    f"{SENTENCEPIECE}*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
)
"""Other forms of the old vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids that stay.

    Attributes:
        ids: ascending; an id's place is its new id.
        coverage: share of the text's tokens that stay as they are; the others are spelled by smaller ones.
    """

    ids: list[int]
    coverage: float


def count_tokens(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Counter[int]:
    """How often each id occurs.

    Args:
        progress: called with the documents done.
    Raises:
        UnsupportedModel: the tokenizer is not a fast one, so what it is made of is not known.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} is a slow tokenizer, whose vocabulary cannot be cut. "
            "Give the model folder a tokenizer.json."
        )
    counts: Counter[int] = Counter()
    done, backend = 0, copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()  # a tokenizer that was saved in a training may have both
    backend.no_padding()
    for batch in _batches(documents):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            counts.update(encoding.ids)
        done += len(batch)
        progress(done)
    return counts


def choose(
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[int, int],
    size: int,
    *,
    embedded: int | None = None,
    named: Container[int] = (),
) -> Vocabulary:
    """The `size` ids to keep: special tokens, bytes, and the most frequent with all that they are merged from; of
    equally frequent ones those of lowest id, which tokenizers give to what is frequent elsewhere.

    Args:
        embedded: ids that the model has an embedding for; a tokenizer may have more (Gemma 3's image tokens).
        named: ids that stay too (see `named_ids`).
    Raises:
        BadRecipe: a size below what must stay, or above what there is.
        UnsupportedModel: a tokenizer of another kind than BPE or Unigram.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = _parts(definition)
    vocabulary = {token: id for token, id in tokenizer.get_vocab().items() if embedded is None or id < embedded}
    kept = {id for id in _essential(tokenizer, definition, counts) if embedded is None or id < embedded}
    kept |= {id for id in vocabulary.values() if id in named}
    for id in list(kept):
        kept |= parts(id)
    if not len(kept) <= size <= len(vocabulary):
        raise BadRecipe(
            f"vocabulary of {size:,}: it needs at least {len(kept):,} (special tokens and bytes), and the teacher has "
            f"{len(vocabulary):,}"
        )
    reserve = {token["id"] for token in definition["added_tokens"]}
    for id in sorted(vocabulary.values(), key=lambda id: (-counts.get(id, 0), id in reserve, id)):
        if len(kept) == size:
            break
        with_parts = {id} | parts(id)
        if len(kept) + len(with_parts - kept) <= size:
            kept |= with_parts
    total = sum(counts.values())
    coverage = sum(number for id, number in counts.items() if id in kept) / max(total, 1)
    return Vocabulary(sorted(kept), coverage)


def named_ids(checkpoint: Checkpoint) -> set[int]:
    """What config and generation config name, such as an end of turn that the tokenizer keeps in reserve."""
    config = checkpoint.config.to_dict()
    parts = [config, config.get(checkpoint.family.nested or "", {}), _generation(checkpoint) or {}]
    values = [value for part in parts for key, value in part.items() if ID_KEY.search(key)]
    return {id for value in values for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)}


def _generation(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What its generation config says, if it has one."""
    if not (checkpoint.folder / GENERATION).is_file():
        return None
    values: dict[str, Any] = GenerationConfig.from_pretrained(checkpoint.folder).to_diff_dict()
    return values


def trim(checkpoint: Checkpoint, vocabulary: Vocabulary, *, to: Path) -> Checkpoint:
    """The model with these tokens alone, written as a plain checkpoint with its tokenizer."""
    index = torch.tensor(vocabulary.ids)
    tensors = {}
    for name, tensor in checkpoint.tensors():
        formulas = checkpoint.layout[name]
        places = [dims.index(formula, checkpoint.architecture, {"vocab": index}.get) for formula in formulas]
        tensors[name] = weights.cut(tensor, places)
    new_id = {old: new for new, old in enumerate(vocabulary.ids)}
    return save(
        to,
        type(checkpoint.config).from_dict(_config(checkpoint, new_id)),
        tensors,
        like=checkpoint,
        extra_files=_tokenizer_files(checkpoint, new_id),
        stale_files=STALE_FILES,
    )


def _config(checkpoint: Checkpoint, new_id: Mapping[int, int]) -> dict[str, Any]:
    """The model's config with new ids and their number."""
    family, config = checkpoint.family, _renumbered(checkpoint.config.to_dict(), new_id)
    size = {family.fields["vocab"]: len(new_id)}
    if family.nested is None:
        return config | size
    return config | {family.nested: _renumbered(config[family.nested], new_id) | size}


def _parts(definition: Mapping[str, Any]) -> Callable[[int], set[int]]:
    """Id → all ids that its token is merged from, however deep."""
    model = definition["model"]
    if model["type"] == "Unigram":
        return lambda id: set()
    if model["type"] != "BPE":
        raise UnsupportedModel(
            f"a {model['type']} tokenizer: its vocabulary cannot be cut, because it cannot spell what is cut off"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedModel(
            "a BPE tokenizer that marks where words begin or end in its tokens: what they are merged from is not known"
        )
    ids: dict[str, int] = model["vocab"]
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault(tuple(merge.split(" ") if isinstance(merge, str) else merge), rank)
    tokens = {id: token for token, id in ids.items()}

    def parts(id: int) -> set[int]:
        return {ids[part] for part in _derivation(tokens.get(id, ""), ranks) if part in ids}

    return parts


def _derivation(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """What appears on the way from the characters of a token to it, as its tokenizer merges them."""
    pieces, seen = list(token), set(token)
    while len(pieces) > 1:
        pairs = itertools.pairwise(pieces)
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        seen.add(pieces[place])
    return seen


def _essential(
    tokenizer: PreTrainedTokenizerBase, definition: Mapping[str, Any], counts: Mapping[int, int]
) -> Iterator[int]:
    """Ids that stay whatever the text: what is added to the model's vocabulary, and what spells all else."""
    model = definition["model"]
    ids = model["vocab"] if model["type"] == "BPE" else {token: id for id, (token, _) in enumerate(model["vocab"])}
    templates = json.dumps(definition.get("post_processor")) + str(tokenizer.chat_template)
    named = set(tokenizer.all_special_tokens)
    for token in definition["added_tokens"]:
        content = token["content"]
        in_use = counts.get(token["id"], 0) or content in templates or content in named
        if in_use or not PLACEHOLDER.search(content):
            yield token["id"]
    if model.get("unk_token") in ids:  # it may be an added token alone
        yield ids[model["unk_token"]]
    if model.get("unk_id") is not None:
        yield model["unk_id"]
    spelled_by_bytes = model.get("byte_fallback")
    for token, id in ids.items():
        if BYTE.fullmatch(token) or token == SPACE or (len(token) == 1 and not spelled_by_bytes):
            yield id


def _tokenizer_files(checkpoint: Checkpoint, new_id: Mapping[int, int]) -> dict[str, str | bytes]:
    """File name → content, of all that names ids."""
    tokenizer = checkpoint.tokenizer()
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    files: dict[str, str | bytes] = {
        "tokenizer.json": json.dumps(_trimmed_definition(definition, new_id), ensure_ascii=False)
    }
    file = checkpoint.folder / SENTENCEPIECE
    if file.is_file():
        files[SENTENCEPIECE] = pieces.kept(file.read_bytes(), new_id)
    settings = checkpoint.folder / "tokenizer_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text())
        old = values.get("added_tokens_decoder", {})
        if old:
            values["added_tokens_decoder"] = {str(new_id[int(id)]): old[id] for id in old if int(id) in new_id}
        files[settings.name] = json.dumps(values, indent=2, ensure_ascii=False)
    if (generation := _generation(checkpoint)) is not None:
        files[GENERATION] = json.dumps(_renumbered(generation, new_id), indent=2)
    return files


def _trimmed_definition(definition: dict[str, Any], new_id: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the kept tokens under their new ids."""
    trimmed = json.loads(json.dumps(definition))
    model = trimmed["model"]
    if model["type"] == "BPE":
        model["vocab"] = {token: new_id[id] for token, id in model["vocab"].items() if id in new_id}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        known = model["vocab"]
        model["merges"] = [pair for pair in pairs if {*pair, pair[0] + pair[1]} <= known.keys()]
    else:
        model["vocab"] = [entry for id, entry in enumerate(model["vocab"]) if id in new_id]
        model["unk_id"] = new_id.get(model["unk_id"])
    added = [token | {"id": new_id[token["id"]]} for token in trimmed["added_tokens"] if token["id"] in new_id]
    trimmed["added_tokens"] = added
    trimmed["truncation"] = trimmed["padding"] = None  # what a caller asks for, and padding names an id
    _renumber_template(trimmed.get("post_processor"), new_id)
    return trimmed


def _renumber_template(processor: dict[str, Any] | None, new_id: Mapping[int, int]) -> None:
    """The ids in a post-processor, in place."""
    if processor is None:
        return
    for each in processor.get("processors", []):
        _renumber_template(each, new_id)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new_id[id] for id in token["ids"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            processor[key][1] = new_id[processor[key][1]]


def _renumbered(values: Mapping[str, Any], new_id: Mapping[int, int]) -> dict[str, Any]:
    """A config with new ids; of those that left none, and no sequence that one of them was part of."""

    def renumber(value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            items = [renumber(item) for item in value]
            return None if None in items else items
        return new_id.get(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def of_key(value: Any) -> Any:
        listed = isinstance(value, list | tuple)
        return [item for item in map(renumber, value) if item is not None] if listed else renumber(value)

    return {key: of_key(value) if ID_KEY.search(key) or key in ID_LISTS else value for key, value in values.items()}


def _batches(documents: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
