"""Text: reading, packing, the split and the order. The tokenizers are trained here, on a few lines."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prunus import text
from prunus.errors import BadData, UnsupportedModel
from prunus.text import Blocks, batch_indices, documents, is_held_out, load_blocks, order, targets, tokenise

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
    blocks = pack(["!"] * 4, tmp_path, block_size=2, tokenizer=tokenizer)
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


def test_blocks_reads_and_tokenises(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", PROSE)
    blocks = text.blocks(str(tmp_path / "a.jsonl"), bpe(), block_size=8, to=tmp_path / "text")
    assert blocks.source == str(tmp_path / "a.jsonl")
    assert blocks.fingerprint == pack(PROSE, tmp_path / "again").fingerprint


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


# ------------------------------------------------------------------------------------------------ documents


def write_jsonl(file: Path, docs: list[str], column: str = "text", **more: object) -> Path:
    lines = "".join(json.dumps({column: document, **more}) + "\n" for document in docs).encode()
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    file.write_bytes(compress.get(file.suffix, bytes)(lines))
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "[odd] *name?.jsonl"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, UNICODE)
    assert list(documents(str(file))) == UNICODE


def test_json_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": document} for document in UNICODE]))
    assert list(documents(str(tmp_path / "a.json"))) == UNICODE


def test_parquet(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": UNICODE, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == UNICODE


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    content = "first\n\nsecond é\n\n\nthird\n".encode()
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    (tmp_path / name).write_bytes(compress.get(Path(name).suffix, bytes)(content))
    assert list(documents(str(tmp_path / name))) == [content.decode()]


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for folder in ("b", "a/deep", ".git"):
        (tmp_path / folder).mkdir(parents=True)
    write_jsonl(tmp_path / "b/2.jsonl.zst", ["second", "third"])
    (tmp_path / "a/deep/1.txt").write_text("first")
    (tmp_path / "z.md").write_text("fourth")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".git/description.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(documents(str(tmp_path))) == ["first", "second", "third", "fourth"]


def test_the_column_of_the_text(tmp_path: Path) -> None:
    only = write_jsonl(tmp_path / "only.jsonl", PROSE, column="body", id=7)
    assert list(documents(str(only))) == PROSE
    two = write_jsonl(tmp_path / "two.jsonl", PROSE, column="body", title="x")
    assert list(documents(str(two), text_field="body")) == PROSE
    with pytest.raises(
        BadData, match=r"two.jsonl: no column 'text'.*Columns: body \(text\), title \(text\)\. Name the one"
    ):
        list(documents(str(two)))
    with pytest.raises(BadData, match=r"no column 'bodi' that holds text.*body \(text\)"):
        list(documents(str(two), text_field="bodi"))
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 1, "name": "x"}\n')
    with pytest.raises(BadData, match=r"Columns: text, name \(text\)"):
        list(documents(str(numbers)))


def test_missing_texts_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"id": 3}\n\n{"text": ""}\n')
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["one"]


def test_chat_data_is_not_taken_for_text(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hello"}], "source": "smoltalk"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadData, match="chat data, which is not read"):
        list(documents(str(tmp_path / "chat.jsonl")))


@pytest.mark.parametrize("source", ["no/such/place", "nowhere", "./corpus", "/tmp/none/at.all", "data/missing.jsonl"])
def test_nothing_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match=r"no such file or folder\. Check the path, or give a hub data set as owner/name"):
        documents(source)


def test_a_hub_data_set_out_of_reach(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        BadData, match=r"^nobody/nothing:en: no such file or folder, and the hub did not give it.*network"
    ):
        list(documents("nobody/nothing:en"))
    assert capfd.readouterr() == ("", "")


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": document} for document in PROSE]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(documents("owner/name:20231101.en")) == list(documents("owner/name")) == PROSE
    assert asked == [("owner/name", "20231101.en", "train", True), ("owner/name", None, "train", True)]


BINARY = bytes(range(256)) * 4
UNREADABLE = {
    "empty.txt": (b"", "it is empty, no document has any text"),
    "empty.jsonl": (b"", "it is empty"),
    "blank.jsonl": (b'{"text": " "}\n', "it is empty"),
    "binary.txt": (BINARY, "not UTF-8 text but binary"),
    "zeros.md": (b"\0" * 64, "not UTF-8 text but binary"),
    "binary.jsonl": (BINARY, "not UTF-8 text but binary"),
    "latin1.jsonl": ('{"text": "café"}\n'.encode("latin-1"), "not UTF-8 text"),
    "latin1.txt": ("café".encode("latin-1"), "not UTF-8 text"),
    "broken.jsonl": (b'{"text": "one"}\n\n{"text": two}\n', r"broken JSON \(line 3: Expecting value at character 10\)"),
    "cut.jsonl": (b'{"text": "one"}\n{"text": "tw', r"broken JSON \(line 2: Unterminated string"),
    "cut.json": (b'[{"text": "one"}, {"te', r"broken JSON \("),
    "strings.jsonl": (b'"one"\n"two"\n', r'must be one object, such as \{"text": "…"\}'),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "one"}\n' * 100)[:-12], "ended before"),
    "not.txt.gz": (b"plain", "it cannot be read"),
    "damaged.parquet": (b"PAR1 nothing", "damaged, or not Parquet"),
    "paper.pdf": (b"%PDF", r"a \.pdf is not text\. Prunus reads \.jsonl"),
    "numbers.json": (b'{"a": 1}', "no column 'text' that holds text. Columns: a"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=rf"{name}: .*{message}"):
        list(documents(str(tmp_path / name)))
    assert capfd.readouterr() == ("", "")


def test_a_line_broken_far_behind_is_found(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(('{"text": "' + "x" * 10_000 + '"}\n') * 1200 + "{broken\n")  # beyond the first 10 MB
    with pytest.raises(BadData, match=r"line 1201: "):
        list(documents(str(file)))


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(BadData, match=r"no readable file in this folder\. Prunus reads .*\.gz or \.zst"):
        documents(str(tmp_path))


# ------------------------------------------------------------------------------------------------ split and order


def test_the_split_follows_the_content() -> None:
    docs = [f"document number {number}" for number in range(4000)]
    train, heldout = text.split_documents(docs, held_out_share=0.05)
    assert len(heldout) == pytest.approx(200, abs=50)
    assert sorted(train + heldout) == sorted(docs)
    more_train, more_heldout = text.split_documents(["something new", *reversed(docs)], held_out_share=0.05)
    assert set(train) <= set(more_train)
    assert set(heldout) <= set(more_heldout)
    assert [document for document in docs if is_held_out(document, share=0.05)] == heldout
    assert not any(is_held_out(document, share=0.0) for document in docs)
    assert all(is_held_out(document, share=1.0) for document in docs)


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
