"""Sources → documents, one at a time, and which of them are held out.

train = (document for document in documents("corpus/") if not is_held_out(document, share=0.05))
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow
import zstandard
from huggingface_hub.utils import logging as hub_logging
from pyarrow import parquet, types
from transformers import PreTrainedTokenizerBase

from prunus.errors import BadData, BadRecipe

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".rst": "text"}
OPENERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".zst": zstandard.open}
OF_RUNS = ("run.json", "family.json")
"""What lies in the folder of a run, and of several."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:.+)?")
CHAT_COLUMNS = ("messages", "conversations")
SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Names of the roles in data written for ShareGPT."""
ROWS_LOOKED_AT = 100  # to tell which columns hold text
PARQUET_ROWS = 1000  # read at a time
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""JSON can hold it where a text was cut; UTF-8 cannot, nor can a tokenizer."""


Message = dict[str, str]
"""One turn: its role and content."""
Render = Callable[[list[Message]], str]
"""A conversation as the text that a model sees (see `chat_template`)."""


def documents(source: str, *, text_field: str | None = None, render: Render | None = None) -> Iterator[str]:
    """Every document of a source, one at a time. Blank documents are left out.

    Args:
        source: a .jsonl, .json, .parquet, .txt, .md or .rst file (.gz and .zst too), a folder of such files (searched
            recursively, read in sorted order, without hidden files and runs of ours), or a hub data set `owner/name`
            or `owner/name:config`, of which the split `train` is streamed. A plain text file is one document.
        text_field: the column that holds the text. Default: `text`, or else a conversation in `messages` (role,
            content) or `conversations` (from, value), or else the only column of strings.
        render: makes text of a conversation; without it chat data is refused.
    Raises:
        BadData: nothing there, nothing readable, not UTF-8, a broken line, or no column of text. Where the contents are
            at fault, it is raised while reading.
    """
    path = _path(source)
    texts: Iterable[str]
    if path.exists():
        texts = itertools.chain.from_iterable(_read(file, text_field, render) for file in _files(path))
    elif _is_on_hub(source):
        texts = _read_hub(source, text_field, render)
    else:
        raise BadData(f"{source}: no such file or folder. Check the path, or give a hub data set as owner/name.")
    return _not_blank(texts, source)


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # noqa: PTH111 - which leaves ~name of nobody as it is


def is_held_out(document: str, *, share: float) -> bool:
    """Whether a document belongs to the held-out part, which is `share` of all documents.

    It depends on the document's text alone: data that is appended, reordered or repeated never moves a document from
    one part to the other, and copies of one document all fall on the same side.

        train = (document for document in documents(source) if not is_held_out(document, share=0.05))
        heldout = (document for document in documents(source) if is_held_out(document, share=0.05))
    """
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def shuffled(docs: Iterable[str], *, seed: int, buffer: int = 10_000, characters: int = 200_000_000) -> Iterator[str]:
    """The documents in a random order that depends on the seed alone; of a long stream, within a moving buffer, which
    holds so many documents or characters.

    A part of a source, such as its first 10M tokens, then is a sample of more than its first file.
    """
    generator, held, size = random.Random(seed), list[str](), 0
    for document in docs:
        held.append(document)
        size += len(document)
        while len(held) == buffer or size > characters:
            place = generator.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            size -= len(held[-1])
            yield held.pop()
    generator.shuffle(held)
    yield from held


def _reader(file: Path) -> str | None:
    name = Path(file.stem) if file.suffix.lower() in OPENERS else file
    return READERS.get(name.suffix.lower())


def check_ends(source: str, tokens: int | None) -> None:
    """Raises BadRecipe where a data set of the hub would be read without end."""
    if tokens is None and _is_on_hub(source):
        raise BadRecipe(f"{source!r} is on the hub; say how much of it to read (--tokens 10M)")


def _is_on_hub(source: str) -> bool:
    path = _path(source)
    return not path.exists() and HUB_ID.fullmatch(source) is not None and _reader(path) is None


def _files(path: Path) -> list[Path]:
    readable = f"Prunus reads {', '.join(READERS)}, also as {' or '.join(OPENERS)}"
    if path.is_file():
        if _reader(path) is None:
            raise BadData(f"{path}: a {path.suffix or 'file without suffix'} is not text. {readable}; convert it.")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file) is not None)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    runs = [file.parent for file in files if file.name in OF_RUNS and (file.parent / "recipe.yaml").is_file()]
    files = [file for file in files if not any(run in file.parents for run in runs)]
    if not files:
        raise BadData(f"{path}: no readable file in this folder. {readable}; put some there or give another folder.")
    return files


def _not_blank(texts: Iterable[str], source: str) -> Iterator[str]:
    empty = True
    for text in texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise BadData(f"{source}: it is empty, no document has any text. Give a source with text.")


def _read(file: Path, text_field: str | None, render: Render | None) -> Iterator[str]:
    if _reader(file) == "text":
        return _read_text(file)
    return _read_table(file, text_field, render)


def _open(file: Path) -> TextIO:
    return OPENERS.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig")


def _read_text(file: Path) -> Iterator[str]:
    """One document, read without `datasets`, which takes longer to open a small file than to read it."""
    try:
        with _open(file) as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except Exception as error:  # a damaged archive raises a type of its own for each kind of damage
        raise BadData(f"{file}: it cannot be read ({_first_line(error)}). Check it, and its permissions.") from error
    if "\0" in text:
        raise _not_utf8(file)
    yield text


def _read_table(file: Path, text_field: str | None, render: Render | None) -> Iterator[str]:
    try:
        with _quiet():
            yield from _texts(_rows(file), text_field, render, str(file))
    except BadData:
        raise
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except StopIteration:  # what `datasets` makes of an empty file
        return
    except Exception as error:  # pyarrow, json, gzip, zstandard and datasets each raise their own
        if _reader(file) == "parquet":
            raise BadData(
                f"{file}: damaged, or not Parquet ({_first_line(error)}). Write or fetch it again."
            ) from error
        raise _broken_json(file, _first_line(error)) from error


def _rows(file: Path) -> Iterable[Mapping[str, Any]]:
    """Rows of a table. Those of JSON lines need not have the same keys, nor types, which `datasets` asks for; nor does
    it know all columns that Parquet may have beside the text."""
    if _reader(file) == "json" and _has_a_row_per_line(file):
        return _json_lines(file)
    if file.suffix.lower() == ".parquet":
        return _parquet_rows(file)
    return datasets.load_dataset(_reader(file), data_files=[glob.escape(str(file))], split="train", streaming=True)


def _has_a_row_per_line(file: Path) -> bool:
    """Other files hold one array of all rows, or one object on several lines."""
    with _open(file) as stream:
        first = next(filter(str.strip, stream), "").lstrip()
    if ".jsonl" in file.name.lower():
        return not first.startswith("[")
    try:
        return first.startswith("{") and bool(json.loads(first))
    except json.JSONDecodeError:
        return False


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Of the columns that may hold text or conversations; the others with nothing in them."""
    with parquet.ParquetFile(file) as table:
        wanted = [field.name for field in table.schema_arrow if _may_hold_text(field.type)]
        others = dict.fromkeys(name for name in table.schema_arrow.names if name not in wanted)
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            yield from (others | row for row in batch.to_pylist())


def _may_hold_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_list, types.is_large_list)
    return any(test(kind) for test in tests)


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as mistake:
                raise _broken_json(file, f"line {number}: {mistake.msg} at character {mistake.colno}") from mistake
            if not isinstance(row, dict):
                raise _broken_json(file, f"line {number} is a {type(row).__name__}")
            yield row


def _read_hub(source: str, text_field: str | None, render: Render | None) -> Iterator[str]:
    name, _, config = source.partition(":")
    try:
        with _quiet():
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
            yield from _texts(rows, text_field, render, source)
    except BadData:
        raise
    except Exception as error:  # the hub client raises a different type for each of: offline, missing, gated, time-out
        raise BadData(
            f"{source}: no such file or folder, and the hub did not give it ({type(error).__name__}: "
            f"{_first_line(error)}). Check the name and the network, or give a local file or folder."
        ) from error


def _texts(
    rows: Iterable[Mapping[str, Any]], text_field: str | None, render: Render | None, source: str
) -> Iterator[str]:
    stream = iter(rows)
    first = list(itertools.islice(stream, ROWS_LOOKED_AT))
    if not first:
        return
    column = _text_column(first, text_field, render, source)
    for row in itertools.chain(first, stream):
        value = row.get(column)
        if render is not None and column in CHAT_COLUMNS and isinstance(value, list):
            value = render(_messages(value, source))
        if value is not None and not isinstance(value, str):
            raise BadData(
                f"{source}: column {column!r} holds a {type(value).__name__} where text belongs: {value!r:.60}"
            )
        yield HALF_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", value or "")


def _text_column(rows: Sequence[Mapping[str, Any]], text_field: str | None, render: Render | None, source: str) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    strings = [column for column in columns if any(isinstance(row.get(column), str) for row in rows)]
    chats = [column for column in CHAT_COLUMNS if column in columns and column not in strings]
    wanted = text_field or "text"
    if wanted in strings or (render is not None and wanted in chats):
        return wanted
    if not text_field and render is not None and chats:
        return chats[0]
    if not text_field and len(strings) == 1 and not chats and "text" not in columns:
        return strings[0]
    listed = ", ".join(f"{column} (text)" if column in strings else column for column in columns)
    why = "it is chat data, but the tokenizer has no chat template to make text of it; " if chats else ""
    raise BadData(
        f"{source}: {why}no column {wanted!r} that holds text. Columns: {listed}. Name the one to read (text_field)."
    )


def _messages(turns: list[Any], source: str) -> list[Message]:
    """Turns of either kind, as role and content."""
    try:
        pairs = [(_either(turn, "role", "from"), _either(turn, "content", "value") or "") for turn in turns]
    except (AttributeError, KeyError) as error:
        raise BadData(
            f"{source}: a conversation whose turns are not role and content, or from and value: {turns!r:.80}"
        ) from error
    return [{"role": SPEAKERS.get(role, role), "content": content} for role, content in pairs]


def _either(turn: Mapping[str, Any], key: str, other: str) -> Any:
    """The value under the one name or the other; a table has both as columns, one of them empty."""
    found = turn.get(key)
    return found if found is not None or (key in turn and other not in turn) else turn[other]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Render | None:
    """The tokenizer's own way to write a conversation; None if it has none.

    A beginning-of-text mark is left out where the tokenizer puts one before every text by itself.
    """
    if not tokenizer.chat_template:
        return None
    start = tokenizer.bos_token
    doubled = start is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]

    def render(messages: list[Message]) -> str:
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise jinja2's errors, of their own choosing
            raise BadData(
                f"the chat template refuses a conversation ({_first_line(error)}): {messages!r:.80}"
            ) from error
        return text.removeprefix(start) if doubled and start else text

    return render


def mixed(sources: Sequence[tuple[Iterable[str], float]]) -> Iterator[str]:
    """Documents of several sources whose characters keep to the given weights at any point. Where one source ends, the
    others go on among themselves.

    The next document comes from the source that has given least for its weight.
    """
    streams = [iter(docs) for docs, _ in sources]
    given = dict.fromkeys(range(len(sources)), 0.0)
    while given:
        number = min(given, key=given.__getitem__)
        document = next(streams[number], None)
        if document is None:
            del given[number]
            continue
        given[number] += len(document) / sources[number][1]
        yield document


def _broken_json(file: Path, why: str) -> BadData:
    return BadData(
        f"{file}: broken JSON ({why}). "
        'Every line of a .jsonl must be one object, such as {"text": "…"}; mend or remove what is broken.'
    )


def _not_utf8(file: Path) -> BadData:
    return BadData(f"{file}: not UTF-8 text but binary, or in another encoding. Convert it to UTF-8, or leave it out.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and logs of `datasets` and the hub client; what matters is raised."""
    level, hub_level = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            datasets.enable_progress_bar()
