"""Start `prunus` in a process of its own, and kill it inside a stage. For test_resume.py and benchmarks/kill.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from prunus.recipe import STAGES
from prunus.run import OUTPUTS

TIMEOUT_SECONDS = 120


def start(*arguments: str) -> subprocess.Popen[str]:
    """One thread, so that every run adds up its numbers in the same order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "prunus", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments: str) -> tuple[str, str]:
    """Run to the end; returns stdout and stderr."""
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, stderr
    return stdout, stderr


def kill_inside(process: subprocess.Popen[str], root: Path, stage: str, delay: float) -> str | None:
    """Kill the process `delay` seconds after it has begun the stage, in distillation after its first checkpoint.

    Returns:
        the stage that it was in when the signal came; None if it had finished.
    """
    before = changed(root / "run.json")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if changed(root / "run.json") != before and has_begun(root, stage):
            time.sleep(delay)
            break
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=TIMEOUT_SECONDS)
    return current_stage(root) if process.returncode == -signal.SIGKILL else None


def has_begun(root: Path, stage: str) -> bool:
    current = current_stage(root)
    if current != stage:
        return current is None or STAGES.index(current) > STAGES.index(stage)
    return stage != "distill" or bool(list(root.glob(".*.training/*/state.json")))


def current_stage(root: Path) -> str | None:
    """The first stage that is not finished."""
    unfinished = (stage for stage in STAGES if not all((root / name).exists() for name in OUTPUTS[stage]))
    return next(unfinished, None)


def changed(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None
