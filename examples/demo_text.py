"""Prose that is on any machine after the install: docstrings and documentation of Python and of the installed packages.

    python examples/demo_text.py --to demo/text

writes train.jsonl and heldout.jsonl, one document per module or file: {"text": …, "source": …}. Whole packages are held
out, so the held-out text is written by other people about other things. No network; the same environment gives the same
files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.metadata
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.08  # of the packages
SALT = "46"  # of the hash that picks them; with it, those that Prunus itself installs hold out 0.3 MB of 8 projects
PACKAGE_BYTES = 500_000  # at most, from one package; transformers alone would be most of the text
HELD_OUT_PACKAGE_BYTES = 300_000
LARGEST_SOURCE_BYTES = 300_000  # larger ones are generated tables
SHORTEST_PARAGRAPH, SHORTEST_DOCUMENT = 60, 300  # characters
SMALLEST_DOCSTRING_SHARE = 0.25  # of a source file
SMALLEST_LETTER_SHARE = 0.87  # letters and spaces, of a paragraph of prose

PYTHON = "python"  # the standard library counts as one package, and its language reference as another
OURS = "prunus"  # left out: the text would change with every edit of our own code
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendored", "site-packages", "idlelib", "lib2to3", "fixtures"}
SKIPPED_FILES = re.compile(r"licen[sc]e|copying|notice|authors|thirdparty|requirements|top_level|entry_points", re.I)
DOCUMENT_SUFFIXES = (".md", ".rst", ".txt")


class Document(NamedTuple):
    package: str
    source: str
    text: str


class File(NamedTuple):
    package: str
    source: str
    path: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path("demo/text"), help="folder (default: demo/text)")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    documents = shuffled(gather())
    for name, held_out in (("train", False), ("heldout", True)):
        part = [document for document in documents if is_held_out(document.package) == held_out]
        lines = [json.dumps({"text": one.text, "source": one.source}, ensure_ascii=False) for one in part]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        megabytes = sum(size(document.text) for document in part) / 1e6
        packages = len({document.package for document in part})
        print(f"{folder / name}.jsonl: {megabytes:.2f} MB of text, {len(part)} documents of {packages} packages")


def gather() -> list[Document]:
    """Documents of all packages, each package up to its cap, no paragraph twice."""
    seen: set[str] = set()
    files: dict[str, list[File]] = {}
    for file in [*installed_files(), *standard_library_files()]:
        files.setdefault(file.package, []).append(file)
    documents = list(language_reference(seen))
    for package in sorted(files):
        documents += up_to_cap(package, (read(file, seen) for file in shuffled(files[package])))
    return documents


def up_to_cap(package: str, documents: Iterable[Document]) -> Iterator[Document]:
    left = HELD_OUT_PACKAGE_BYTES if is_held_out(package) else PACKAGE_BYTES
    for document in documents:
        if len(document.text) >= SHORTEST_DOCUMENT:
            yield document
            left -= size(document.text)
        if left <= 0:
            return


def is_held_out(package: str) -> bool:
    return package != PYTHON and hashed(f"{SALT}/{package}") < HELD_OUT_SHARE * 2**64


def hashed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def shuffled(items: Iterable) -> list:
    """In an order that depends on the sources' names only, so that a cap takes from all over a package."""
    return sorted(items, key=lambda item: (hashed(item.source), item.source))


def size(text: str) -> int:
    return len(text.encode())


# ---------------------------------------------------------------------------------------------- where text is


def installed_files() -> Iterator[File]:
    """Sources and documents of the installed distributions, their descriptions included."""
    for distribution in importlib.metadata.distributions():
        package = (distribution.name or OURS).lower().replace("_", "-")  # no name: a broken leftover
        for file in distribution.files or () if package != OURS else ():
            path = Path(str(file.locate()))
            is_text = file.suffix == ".py" or file.suffix in DOCUMENT_SUFFIXES or file.name == "METADATA"
            if is_text and not is_skipped(file.parts) and path.is_file():
                yield File(package, f"{package}/{file.as_posix()}", path)


def standard_library_files() -> Iterator[File]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not is_skipped(parts):
            yield File(PYTHON, "/".join((PYTHON, *parts)), path)


def is_skipped(parts: tuple[str, ...]) -> bool:
    return bool(SKIPPED_FOLDERS.intersection(parts) or SKIPPED_FILES.search(parts[-1]) or ".." in parts)


def language_reference(seen: set[str]) -> Iterator[Document]:
    """The parts of Python's manual that `help()` shows."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        text = prose([topics[name]], seen)
        if len(text) >= SHORTEST_DOCUMENT:
            yield Document("python-reference", f"python-reference/{name}", text)


# ---------------------------------------------------------------------------------------------- what is prose


def read(file: File, seen: set[str]) -> Document:
    parts: list[str] = []
    if file.path.stat().st_size <= LARGEST_SOURCE_BYTES:
        source = file.path.read_text(encoding="utf-8", errors="replace")
        if file.path.suffix == ".py":
            parts = docstrings(source)
        elif file.path.name == "METADATA":
            parts = [source.partition("\n\n")[2]]  # the headers end at the first blank line
        else:
            parts = [source]
    return Document(file.package, file.source, prose(parts, seen))


def docstrings(source: str) -> list[str]:
    """Docstrings of a module, its classes and functions, in their order."""
    quoted = sum(map(len, source.split('"""')[1::2]))
    if quoted < SMALLEST_DOCSTRING_SHARE * len(source):  # parsing takes most of the time, so parse where it pays
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # templates, Python 2
        return []
    return list(docstrings_below(tree))


def docstrings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings_below(child)


def prose(parts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs that read as prose and were not seen before; a paragraph that many modules copy stays in one."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(map(textwrap.dedent, parts))):
        text = textwrap.dedent(paragraph.expandtabs()).strip()
        key = " ".join(text.lower().split())
        if is_prose(text) and key not in seen:
            seen.add(key)
            kept.append(text)
    return "\n\n".join(kept)


def is_prose(text: str) -> bool:
    """Mostly letters, a few words at least, and neither code, table, drawing nor markup."""
    if len(text) < SHORTEST_PARAGRAPH or "\ufffd" in text or re.match(r">>>|\.\. |```|<|\||#!", text):
        return False
    letters = len(re.sub(r"[^\w\s]|[\d_]", "", text))
    words = re.findall(r"[A-Za-z]+", text)
    return letters >= SMALLEST_LETTER_SHARE * len(text) and len(words) >= 10 and len(max(text.split(), key=len)) < 60


if __name__ == "__main__":
    main()
