"""When a training goes wrong, has nothing left to gain, or is asked to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

SPIKE, HISTORY = 20.0, 50
"""A step whose gradient is this many times as long as the median of the last ones is left out."""
PATIENCE = 5
"""Bad steps in a row before a run goes back to its last checkpoint, at half the rate."""

Curve = Sequence[dict[str, Any]]
"""One point per step, see `distill.State`."""


def is_bad(point: dict[str, Any], curve: Curve) -> bool:
    """No finite loss or gradient, or a gradient far longer than those before."""
    if not (math.isfinite(point["loss"]) and math.isfinite(point["norm"])):
        return True
    recent = [earlier["norm"] for earlier in curve[-HISTORY:] if "skipped" not in earlier]
    return len(recent) >= HISTORY // 2 and point["norm"] > SPIKE * statistics.median(recent)


def is_lost(curve: Curve) -> bool:
    """Whether all of the last steps were bad."""
    return len(curve) >= PATIENCE and all("skipped" in point for point in curve[-PATIENCE:])


def on_plateau(curve: Curve, patience: int) -> bool:
    """Whether the held-out loss has not fallen in the last `patience` measurements."""
    measured = [point["heldout_loss"] for point in curve if "heldout_loss" in point]
    return 0 < patience < len(measured) and min(measured[-patience:]) >= min(measured[:-patience])


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Set when the process is asked to stop, as a scheduler does before it takes the machine away."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen to signals
        return

    def ask(_: int, __: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
