"""Text: packing, and the order. The tokenizers are trained here, on a few lines."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prunus import text
from prunus.errors import BadData, UnsupportedModel
from prunus.text import Blocks, batch_indices, load_blocks, order, targets, tokenise

PROSE = ["the cat sat on the mat", "a dog ran after the cat", "the mat lay on the floor, where the dog slept"]
UNICODE = ["naïve café, 12 €", "日本語のテキスト。", "emoji 😀 and 𝔘nicode", "ascii only"]


def bpe(*, eos: bool = True, bos: bool = False, appends_eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    template = f"{'<s> ' if bos else ''}$A{' </s>' if appends_eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8, **names)


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece-like, as in Llama 2: normalises, prepends a space, falls back to <unk>."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", -10.0), ("▁the", -1.0), ("▁", -2.0), ("cat", -2.0)], 0, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pack(docs: list[str], folder: Path, *, block_size: int = 8, tokenizer: PreTrainedTokenizerFast | None = None,
         max_tokens: int | None = None) -> Blocks:  # fmt: skip
    return tokenise(
        docs, tokenizer or bpe(), block_size=block_size, max_tokens=max_tokens, to=folder / "text", label="test"
    )


def utf8_length(docs: list[str]) -> int:
    return sum(len(document.encode()) for document in docs)


# ------------------------------------------------------------------------------------------------ packing


def test_documents_are_packed_back_to_back_each_closed_by_eos(tmp_path: Path) -> None:
    tokenizer = bpe()
    stream = [token for document in PROSE for token in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
    blocks = pack(PROSE, tmp_path)
    assert blocks.tokens.flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert (len(blocks), blocks.block_size, blocks.num_tokens) == (len(stream) // 8, 8, len(stream) // 8 * 8)


def test_positions_restart_at_documents_and_at_blocks(tmp_path: Path) -> None:
    docs = ["abc", "0123456789", "z"]  # with eos 4, 11 and 2 tokens: no merges were learnt for these letters
    blocks = pack([*docs, "......."], tmp_path)
    assert blocks.positions.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 0],
        [0, 0, 1, 2, 3, 4, 5, 6],
    ]


def test_a_position_is_the_distance_to_the_document_or_block_start(tmp_path: Path) -> None:
    """The naive twin of the packing: token by token."""
    tokenizer, naive = bpe(), []
    for document in UNICODE + PROSE:
        for place, _ in enumerate([*tokenizer(document)["input_ids"], tokenizer.eos_token_id]):
            naive.append(0 if place == 0 or len(naive) % 16 == 0 else naive[-1] + 1)
    blocks = pack(UNICODE + PROSE, tmp_path, block_size=16)
    assert blocks.positions.flatten().tolist() == naive[: blocks.num_tokens]


def test_targets_stay_inside_block_and_document() -> None:
    positions_BS = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]])
    mask_BS = targets(torch.zeros_like(positions_BS), positions_BS)
    assert mask_BS.tolist() == [[True, True, False, True, False], [False, False, True, True, False]]


def test_eos_is_predicted_and_what_follows_it_is_not(tmp_path: Path) -> None:
    tokens_BS, positions_BS = pack(PROSE, tmp_path, block_size=16).batch([0])
    mask_BS = targets(tokens_BS, positions_BS)
    is_eos_BS = tokens_BS == bpe().eos_token_id
    assert is_eos_BS.any()
    assert not mask_BS[is_eos_BS].any()
    assert mask_BS[:, :-1][is_eos_BS[:, 1:]].all()


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(bpe(bos=True), [0, -1, 1]), (bpe(appends_eos=True), [-1, 1]), (bpe(eos=False), [-1])],
    ids=["bos", "eos once", "no eos"],
)
def test_special_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, expected: list[int]) -> None:
    letter = tokenizer.convert_tokens_to_ids("!")
    blocks = pack(["!"] * 4, tmp_path, block_size=len(expected), tokenizer=tokenizer)
    one_document = [letter if token == -1 else token for token in expected]
    assert blocks.tokens.flatten().tolist() == (one_document * 4)[: blocks.num_tokens]


def test_small_vocabularies_are_stored_in_two_bytes(tmp_path: Path) -> None:
    assert pack(PROSE, tmp_path).tokens.dtype == np.uint16
    wide = bpe()
    wide.add_tokens([f"<extra {number}>" for number in range(2**16)])
    blocks = pack(["<extra 65500>", *PROSE], tmp_path, tokenizer=wide)
    assert blocks.tokens.dtype == np.uint32
    assert blocks.tokens[0, 0] == wide.convert_tokens_to_ids("<extra 65500>") > 2**16 - 1


def test_max_tokens_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 100)
    read: list[str] = []

    def endless() -> itertools.chain[str]:
        for document in itertools.cycle(PROSE):
            read.append(document)
            yield document

    blocks = tokenise(endless(), bpe(), block_size=8, max_tokens=100, to=tmp_path / "text", label="endless")
    assert len(blocks) == 12
    assert utf8_length(read) < 1000


def test_progress_counts_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 60)
    seen: list[int] = []
    tokenise(PROSE * 3, bpe(), block_size=8, to=tmp_path / "text", label="test", progress=seen.append)
    tokenizer = bpe()
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == sum(len(tokenizer(document)["input_ids"]) + 1 for document in PROSE * 3)


def test_the_size_of_batches_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(PROSE + UNICODE, tmp_path / "a")
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 60)
    parts = pack(PROSE + UNICODE, tmp_path / "b")
    assert whole.fingerprint == parts.fingerprint
    assert whole.bytes_per_block.tolist() == parts.bytes_per_block.tolist()


@pytest.mark.parametrize(
    ("document", "sizes"), [("aaa bbb\nccc ddd", [8, 7]), ("aaa bbb ccc", [8, 3]), ("x" * 25, [10, 10, 5])]
)
def test_long_documents_are_cut_at_lines_then_spaces(
    monkeypatch: pytest.MonkeyPatch, document: str, sizes: list[int]
) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 10)
    pieces = list(text._pieces(document))
    assert "".join(pieces) == document
    assert [len(piece) for piece in pieces] == sizes


def test_a_document_of_any_length_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 20)
    start = time.monotonic()
    assert sum(map(len, text._pieces("word " * 400_000))) == 2_000_000
    assert time.monotonic() - start < 2  # 8 s, were the rest copied for each piece


def test_long_documents_bring_no_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pack([" ".join(PROSE * 50)], tmp_path)  # the tokenizer's model_max_length is 8
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("tokenizer", [bpe(), bpe(bos=True), bpe(appends_eos=True), metaspace()])
@pytest.mark.parametrize("docs", [PROSE, UNICODE, ["  spaces \n around  ", "ﬁ ½ Å the  cat \t"]])
def test_bytes_are_those_of_the_documents(tmp_path: Path, docs: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(docs * 2, tmp_path, block_size=1, tokenizer=tokenizer)  # blocks of 1: no token is dropped
    assert blocks.num_bytes == utf8_length(docs * 2)
    assert (blocks.bytes_per_block >= 0).all()


def test_bytes_of_each_block_are_those_of_its_tokens(tmp_path: Path) -> None:
    """Byte-level tokens of ASCII decode to exactly their own text."""
    tokenizer, docs = bpe(), [*PROSE, "a dog"]
    blocks = pack(docs, tmp_path)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in blocks.tokens.astype(int)]
    assert blocks.bytes_per_block.tolist() == [len(part.encode()) for part in decoded]
    assert blocks.head(2).num_bytes == len((decoded[0] + decoded[1]).encode())
    assert blocks.num_bytes == utf8_length(PROSE) < utf8_length(docs)  # the dropped tail is not counted


# ------------------------------------------------------------------------------------------------ Blocks


def test_batches_are_int64_and_in_the_order_asked_for(tmp_path: Path) -> None:
    blocks = pack(PROSE, tmp_path)
    tokens_BS, positions_BS = blocks.batch([2, 0, 2])
    assert tokens_BS.dtype == positions_BS.dtype == torch.int64
    assert tokens_BS.tolist() == blocks.tokens[[2, 0, 2]].tolist()
    assert positions_BS.tolist() == blocks.positions[[2, 0, 2]].tolist()


def test_views(tmp_path: Path) -> None:
    blocks = pack(PROSE, tmp_path)
    assert isinstance(blocks.tokens, np.memmap)
    assert isinstance(blocks.head(2).tokens, np.memmap)
    picked = blocks.select([3, 1])
    assert picked.tokens.tolist() == blocks.tokens[[3, 1]].tolist()
    assert picked.num_bytes == blocks.bytes_per_block[[3, 1]].sum()
    assert len(blocks.head(10**9)) == len(blocks)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    blocks = pack(PROSE, tmp_path / "a")
    assert len(blocks.fingerprint) == 64
    assert blocks.fingerprint == pack(PROSE, tmp_path / "b").fingerprint == load_blocks(tmp_path / "a/text").fingerprint
    assert blocks.head(2).fingerprint == blocks.select([0, 1]).fingerprint
    others = [blocks.head(2), blocks.select([1, 0]), pack(PROSE[::-1], tmp_path / "c")]
    assert len({blocks.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_files_on_disk(tmp_path: Path) -> None:
    blocks = pack(PROSE, tmp_path)
    folder = tmp_path / "text"
    assert sorted(file.name for file in folder.iterdir()) == [
        "bytes.npy",
        "manifest.json",
        "positions.npy",
        "tokens.npy",
    ]
    assert json.loads((folder / "manifest.json").read_text()) == {
        "source": "test", "num_blocks": len(blocks), "block_size": 8
    }  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["text"]  # nothing half-written beside it


def test_too_short(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"test: too short, 3 tokens; at least 16 are needed \(2 blocks of 8\)"):
        pack(["!!"], tmp_path)
    with pytest.raises(BadData, match=r"15 tokens \(max_tokens=15\); at least 16"):
        pack(PROSE, tmp_path, max_tokens=15)
    assert not list(tmp_path.iterdir())


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModel, match=r"Slow is a slow tokenizer.*tokenizer\.json"):
        tokenise(PROSE, Slow(), block_size=8, to=tmp_path / "text", label="test")


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="nowhere: not a folder of tokenised text"):
        load_blocks(tmp_path / "nowhere")
    pack(PROSE, tmp_path)
    tokens = tmp_path / "text/tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(BadData, match=r"damaged.*tokenise again"):
        load_blocks(tmp_path / "text")


# ------------------------------------------------------------------------------------------------ order


def test_the_order_is_a_permutation_of_its_own_for_each_seed_and_epoch() -> None:
    orders = [order(100, seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(100)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    order.cache_clear()
    assert order(100, seed=0, epoch=0).tolist() == orders[0]


def test_the_order_does_not_change_between_versions() -> None:
    assert order(8, seed=3, epoch=1).tolist() == [0, 7, 6, 1, 5, 3, 2, 4]


def test_every_epoch_reads_every_block_once() -> None:
    steps = [batch_indices(step, 4, 10, seed=5) for step in range(5)]  # 20 blocks: two epochs of 10
    read = [index for batch in steps for index in batch]
    assert read[:10] == order(10, seed=5, epoch=0).tolist()
    assert read[10:] == order(10, seed=5, epoch=1).tolist()


def test_the_state_is_one_integer() -> None:
    """Any later step can be asked for first, and a batch may be larger than an epoch."""
    straight = [batch_indices(step, 3, 7, seed=1) for step in range(20)]
    order.cache_clear()
    assert [batch_indices(step, 3, 7, seed=1) for step in reversed(range(20))] == straight[::-1]
    assert batch_indices(0, 60, 7, seed=1) == [index for batch in straight for index in batch]


def test_a_block_within_a_document_begins_with_bos_where_documents_do(tmp_path: Path) -> None:
    """Models trained so (Gemma) are lost without it."""
    tokenizer = bpe(bos=True)
    blocks = tokenise(PROSE, tokenizer, block_size=16, to=tmp_path / "text", label="prose")
    tokens_BS, positions_BS = blocks.batch(range(len(blocks)))
    assert (tokens_BS[:, 0] == tokenizer.bos_token_id).all()
    stream = [token for document in PROSE for token in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
    inserted = torch.zeros_like(tokens_BS, dtype=torch.bool)
    at = 0
    for block, first in enumerate(tokens_BS):
        inserted[block, 0] = stream[at] != tokenizer.bos_token_id
        at += len(first) - int(inserted[block, 0])
    assert inserted.any()
    assert tokens_BS[~inserted].tolist() == stream[:at]
    assert (positions_BS[:, 0] == 0).all()
    assert targets(tokens_BS, positions_BS)[inserted].all()
