"""Mistakes that pydantic finds in plain data, each as a line that says what to change."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explained(error: ValidationError, section: type[BaseModel]) -> list[str]:
    """Args:
    section: what the data should have been; its keys are suggested for unknown ones.
    """
    return [_explained(detail, section) for detail in error.errors()]


def _explained(detail: Mapping[str, Any], section: type[BaseModel]) -> str:
    path = [str(part) for part in detail["loc"]]
    where, kind = ".".join(path), detail["type"]
    if kind == "extra_forbidden":
        *parents, last = path
        options = _known_keys(section, parents)
        close = difflib.get_close_matches(last, options, n=1, cutoff=0.5)
        known = f"did you mean {'.'.join([*parents, *close])!r}?" if close else f"known here: {', '.join(options)}"
        return f"unknown key {where!r}; {known}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"{where}: {unknown(str(detail['input']), options)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def unknown(value: str, options: list[str]) -> str:
    """Of a value that should be one of these."""
    close = difflib.get_close_matches(value, options, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(options)}"
    return f"{value!r} is unknown; {hint}"


def _known_keys(section: type[BaseModel], path: list[str]) -> list[str]:
    """Of the section at a path; of all of them where it leads into something else, such as a list."""
    here = section
    for part in path:
        field = here.model_fields.get(part)
        inner = getattr(field, "annotation", None)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return list(_all_keys(section))
        here = inner
    return list(here.model_fields)


def _all_keys(annotation: Any) -> Iterator[str]:
    """Of a section and of those inside it, whatever they are wrapped in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield name
            yield from _all_keys(field.annotation)
    for part in get_args(annotation):
        yield from _all_keys(part)
