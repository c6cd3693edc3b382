"""Documents: every kind of source, what is wrong with one, and the split."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from prunus.documents import chat_template, documents, is_held_out, mixed, shuffled
from prunus.errors import BadData
from prunus.recipe import Data
from prunus.sides import sides

PROSE = ["the cat sat on the mat", "a dog ran after the cat", "the mat lay on the floor, where the dog slept"]
UNICODE = ["naïve café, 12 €", "日本語のテキスト。", "emoji 😀 and 𝔘nicode", "ascii only"]


def write_jsonl(file: Path, docs: list[str], column: str = "text", **more: object) -> Path:
    lines = "".join(json.dumps({column: document, **more}) + "\n" for document in docs).encode()
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    file.write_bytes(compress.get(file.suffix.lower(), bytes)(lines))
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL.GZ", "a.json", "[odd] *name?.jsonl"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, UNICODE)
    assert list(documents(str(file))) == UNICODE


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_far_behind_may_have_other_columns_and_types(tmp_path: Path, name: str) -> None:
    rows = [{"text": "x" * 10_000, "id": 1, "from": None}] * 1200  # more than `datasets` looks at to tell the types
    others = [{"text": "one", "id": "7"}, {"text": "two", "from": {"url": "u"}}, {"new": 1, "text": "three"}]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows + others))
    assert list(documents(str(tmp_path / name)))[-3:] == ["one", "two", "three"]


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "whole \\ud83d\\ude00, cut \\ud83d"}\n')
    (document,) = documents(str(tmp_path / "a.jsonl"))
    assert document == "whole 😀, cut \N{REPLACEMENT CHARACTER}"
    assert is_held_out(document, share=1.0)


def test_json_array(tmp_path: Path) -> None:
    for name, indent in itertools.product(("a.json", "a.jsonl"), (None, 2)):
        (tmp_path / name).write_text(json.dumps([{"text": document} for document in UNICODE], indent=indent))
        assert list(documents(str(tmp_path / name))) == UNICODE


def test_parquet(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": UNICODE, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == UNICODE


def test_parquet_with_columns_that_hold_no_text(tmp_path: Path) -> None:
    table = {
        "tags": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "at": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "kind": pyarrow.array(["web", "book"]).dictionary_encode(),
        "text": pyarrow.array(PROSE[:2], pyarrow.large_string()),
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == PROSE[:2]
    assert list(documents(str(tmp_path / "a.parquet"), text_field="kind")) == ["web", "book"]
    with pytest.raises(BadData, match=r"Columns: tags, at, kind \(text\), text \(text\)\."):
        list(documents(str(tmp_path / "a.parquet"), text_field="tags"))


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


def plain(messages: list[dict[str, str]]) -> str:
    return " | ".join(f"{message['role']}: {message['content']}" for message in messages)


@pytest.mark.parametrize(
    ("column", "turns"),
    [
        ("messages", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]),
        ("conversations", [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]),
    ],
)
def test_conversations_become_text(tmp_path: Path, column: str, turns: list[dict[str, str]]) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"id": "7", column: turns}) + "\n")
    parquet.write_table(pyarrow.table({"id": ["7"], column: [turns]}), tmp_path / "chat.parquet")
    for name in ("chat.jsonl", "chat.parquet"):
        assert list(documents(str(tmp_path / name), render=plain)) == ["user: hi | assistant: hello"]
    assert list(documents(str(tmp_path / "chat.jsonl"), text_field=column, render=plain)) == [
        "user: hi | assistant: hello"
    ]


def test_text_comes_before_conversations(tmp_path: Path) -> None:
    row = {"text": "plain", "messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "both.jsonl").write_text(json.dumps(row) + "\n")
    assert list(documents(str(tmp_path / "both.jsonl"), render=plain)) == ["plain"]


def test_turns_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"speaker": "me"}]}) + "\n")
    with pytest.raises(BadData, match="not role and content"):
        list(documents(str(tmp_path / "chat.jsonl"), render=plain))


def test_the_chat_template_of_the_tokenizer(whole_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whole_model)
    assert chat_template(tokenizer) is None
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    tokenizer.bos_token = "<s>"
    messages = [{"role": "user", "content": "a cat"}]
    assert chat_template(tokenizer)(messages) == "<s><user>a cat"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert chat_template(tokenizer)(messages) == "<user>a cat"  # the tokenizer adds the mark itself
    with pytest.raises(BadData, match="refuses a conversation"):
        chat_template(tokenizer)([{"role": "tool", "content": "x"}])


def test_a_mixture_keeps_to_its_weights() -> None:
    sources = [(["a" * 10] * 100, 3.0), (["b" * 5] * 200, 1.0)]
    taken = list(itertools.islice(mixed(sources), 100))
    shares = {letter: sum(len(document) for document in taken if letter in document) for letter in "ab"}
    assert shares["a"] / shares["b"] == pytest.approx(3.0, rel=0.05)
    everything = list(mixed(sources))
    assert len(everything) == 300
    assert list(mixed([([], 1.0), (["x"], 1.0)])) == ["x"]


def test_chat_data_is_not_taken_for_text(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hello"}], "source": "smoltalk"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadData, match="chat data, but the tokenizer has no chat template"):
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


@pytest.mark.parametrize("text", ["Title\n" + "word " * 2000, "word " * 2000, "word\n" * 2000, "w" * 10_000])
def test_few_documents_are_divided_near_their_ends(tmp_path: Path, text: str) -> None:
    """At the end of a line or a word where one is near."""
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": f"{text}{n}"}) + "\n" for n in range(20)))
    parts = {name: "".join(docs) for name, docs in sides(Data(train=str(file)), None).items()}
    assert len(parts["heldout"]) == pytest.approx(0.05 * 20 * len(text), rel=0.15)
    assert sum(map(len, parts.values())) == pytest.approx(20 * len(text), rel=0.01)


@pytest.mark.parametrize(
    "empty", [{"role": "system", "content": ""}, {"role": "system", "content": None}, {"from": "system", "value": ""}]
)
def test_a_turn_that_says_nothing(tmp_path: Path, empty: dict[str, str | None]) -> None:
    named = dict(zip(empty, ("user", "hello"), strict=True))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [empty, named]}) + "\n")
    seen: list[list[dict[str, str]]] = []
    list(documents(str(tmp_path / "chat.jsonl"), render=lambda messages: seen.append(messages) or "x"))
    assert seen == [[{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]]


def test_the_split_follows_the_content() -> None:
    docs = [f"document number {number}" for number in range(4000)]
    heldout = [document for document in docs if is_held_out(document, share=0.05)]
    assert len(heldout) == pytest.approx(200, abs=50)
    assert [document for document in reversed(docs) if is_held_out(document, share=0.05)] == heldout[::-1]
    assert not any(is_held_out(document, share=0.0) for document in docs)
    assert all(is_held_out(document, share=1.0) for document in docs)


def test_shuffling_keeps_every_document_and_repeats_itself() -> None:
    docs = [str(number) for number in range(300)]
    found = list(shuffled(docs, seed=0, buffer=50))
    assert found != docs
    assert sorted(found) == sorted(docs)
    assert found == list(shuffled(docs, seed=0, buffer=50))
    assert found != list(shuffled(docs, seed=1, buffer=50))


def test_no_more_is_held_than_so_many_characters() -> None:
    read = []
    docs = ("x" * 100 for number in range(300) if not read.append(number))
    found = shuffled(docs, seed=0, characters=1000)
    next(found)
    assert len(read) == 11
    assert len(list(found)) == 299
