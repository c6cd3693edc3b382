"""What the user sees while long work runs: a line per stage, and bars with rate and time left on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

FIRST = os.environ.get("RANK", "0") == "0"
"""Of several processes that train together, one reports."""
ERRORS = Console(stderr=True, highlight=False)
"""Progress and messages go to stderr; stdout is for results."""

Step = Callable[[int, int], None]
"""Called with what is done and what is to be done."""


class _Rate(ProgressColumn):
    """Units per second so far, such as tokens/s."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if not task.elapsed or not task.completed:
            return Text(f"– {unit}/s")
        return Text(f"{task.completed / task.elapsed:,.0f} {unit}/s" if unit == "tokens" else "")


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """A line when a stage has ended, with the time it took."""
    start = time.monotonic()
    if ERRORS.is_terminal:
        ERRORS.print(f"[bold]{title}[/bold] …")
    yield
    ERRORS.print(f"{title}: {duration(time.monotonic() - start)}")


def heading(title: str) -> None:
    """A line before the stages of one of several runs."""
    if FIRST:
        ERRORS.print(f"[bold]{title}[/bold]")


@contextlib.contextmanager
def bar(description: str, *, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar; nothing where stderr is not a terminal. Yields step(done, total, note='')."""
    if not (FIRST and sys.stderr.isatty()):
        yield lambda done, total, note="": None
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=ERRORS, transient=True) as progress:
        task = progress.add_task(description, total=None, unit=unit, note="")
        yield lambda done, total, note="": progress.update(task, completed=done, total=total, note=note)


def duration(seconds: float) -> str:
    """7 s · 3 min 05 s · 2 h 10 min"""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
