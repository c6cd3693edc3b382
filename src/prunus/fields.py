"""Types of a recipe's values: what a user may write, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from prunus.budget import TIMES, check_amount, parse_quantity
from prunus.mistakes import unknown


def _count(value: object) -> object:
    """`200k` → 200000; everything else is left to the type check."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    if isinstance(value, str):
        number = parse_quantity(value)
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)
    return value


Count = Annotated[int, BeforeValidator(_count), Field(ge=1)]
Block = Annotated[int, BeforeValidator(_count), Field(ge=2)]
"""Tokens of a block; of one alone no next one could be predicted."""
_Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]
Amount = Annotated[_Text, AfterValidator(check_amount)]
Amounts = Annotated[_Text, AfterValidator(lambda v: ",".join(check_amount(part.strip()) for part in v.split(",")))]


def expanded(path: str) -> str:
    """With the home folder for ~. Raises ValueError of a user that is not there."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


Location = Annotated[str, AfterValidator(expanded)]
"""A file or folder, or a hub id."""
Time = Annotated[str, AfterValidator(lambda value: check_amount(value, TIMES))]


def name_of(options: Iterable[str]) -> Any:
    """One of these names; a typo gets a suggestion."""
    options = list(options)

    def check(value: object) -> object:
        if value not in options:
            raise ValueError(unknown(str(value), options))
        return value

    return Annotated[str, BeforeValidator(check)]
