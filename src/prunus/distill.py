"""The training loop, top to bottom: a student learns its teacher's next-token distributions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunus import anatomy, hardware, hidden, layerwise, memory, parallel, watch, weight_size
from prunus.checkpoint import Checkpoint, from_config, load, save
from prunus.errors import BadData, BadOutput, Stopped, TrainingDiverged
from prunus.evaluate import quality
from prunus.frozen import freeze
from prunus.masters import Masters, ShardedMasters
from prunus.schedule import Plan, Settings, check_shared, learning_rate, plan
from prunus.source import filling, hollow
from prunus.step import STUDENT, Losses, accumulate
from prunus.teacher import Cache, Live, Teacher, Text
from prunus.text import Blocks, targets
from prunus.weights import Parts

TRAINING_FILE = "training.json"
CHECKPOINT_SECONDS = 120.0
"""Time between two checkpoints of an unfinished run: what a killed run loses at the most."""
MAX_ROLLBACKS = 3
"""How often a run goes back to its last checkpoint."""


@dataclass(frozen=True)
class Progress:
    """One finished optimizer step.

    Attributes:
        norm: of the gradient, before clipping.
        heldout_loss: nats per token of the validation text, in the steps that measured it.
    """

    step: int
    steps: int
    tokens: int
    total_tokens: int
    loss: float
    learning_rate: float
    norm: float
    heldout_loss: float | None = None


@dataclass
class State:
    """All that a run depends on besides weights and moments; kept with them on disk.

    Attributes:
        key: names models, text and settings.
        micro_blocks, chunk_tokens: chosen at the first start, so that a run that goes on elsewhere rounds alike.
        curve: one point per step: loss, learning_rate, norm, and where they apply hidden_loss, heldout_loss, skipped.
        events: what happened besides plain steps.
        rate_factor: halved by each roll-back.
        seconds: spent in earlier runs.
    """

    key: str
    micro_blocks: int
    chunk_tokens: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    rate_factor: float = 1.0
    seconds: float = 0.0


def distill(
    student: Checkpoint,
    teacher: Checkpoint | Cache | None,
    blocks: Blocks,
    *,
    to: Path | str,
    settings: Settings | None = None,
    random_init: bool = False,
    pairs: hidden.Pairs | None = None,
    validation: Blocks | None = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Checkpoint:
    """Train the student on its teacher, and write it as a plain checkpoint.

    By default on the forward KL alone, no cross-entropy: Minitron, arXiv:2407.14679, table 12. A run that was killed
    goes on from its last checkpoint beside `to`, and ends with the same bits as an undisturbed one; one that is asked
    to stop (SIGTERM) saves its state first.

    Args:
        student: the starting point; same vocabulary as the teacher.
        teacher: a model, or the cache of one on this text; None trains on the text itself, by cross-entropy.
        blocks: training text.
        to: folder to write; appears whole or not at all.
        random_init: start from random weights of the student's shape instead (the baseline).
        pairs: of layers for the hidden-state loss, where the settings ask for it.
        validation: text for `settings.evaluate_every`.
        dtype: of the computation (default: bfloat16 where the machine has it). Masters and Adam's state are float32.
        gradient_checkpointing: compute each layer again in the backward pass: a quarter more work, far less memory.
        compiled: pass the layers of both models through torch.compile.
    Raises:
        BadData: text shorter than a step, or a cache of something else. BadOutput: an unfinished run with other
        settings lies beside `to`. TrainingDiverged: no finite loss, before the first checkpoint or at an eighth of the
        learning rate. Stopped.
    """
    to, settings = Path(to), settings or Settings()
    if teacher is None:  # text is taken as it is, whatever would be asked of a teacher
        settings = dataclasses.replace(settings, divergence="forward_kl", temperature=1.0)
    hardware.keep_freed_memory()
    schedule = plan(
        settings,
        hidden=student.architecture.hidden,
        num_blocks=len(blocks),
        block_size=blocks.block_size,
        distilled=teacher is not None,
        size=math.inf if random_init or settings.learning_rate else weight_size.of_layers(student),
    )
    dtype, device = dtype or hardware.compute_dtype(), hardware.device()
    _check(settings, schedule, teacher, blocks, pairs, validation)
    key = _key(student, teacher, blocks, settings, random_init, dtype, pairs, validation)
    folder = training_state(to)
    state = _earlier(folder, key) or State(
        key, *_fitting(student, teacher, settings, schedule, dtype, gradient_checkpointing)
    )

    # 1. The teacher, and a student in `dtype` with float32 masters.
    source = _opened(teacher, dtype, device)
    # Ranks load what they will hold of it; but to the whole of it projectors are fitted.
    whole = not parallel.world().several or (pairs is not None and pairs.channels is None)
    model = _start(student, random_init, settings.seed, device if whole else None)
    losses = Losses(model, source, blocks, settings, pairs, state.micro_blocks, state.chunk_tokens)
    masters = _masters(losses, student, dtype)
    if gradient_checkpointing:
        # transformers renamed it in 5.2x; the old name goes in version 6.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if compiled:
        for each in [model, source.model] if isinstance(source, Live) else [model]:
            layerwise.compile_layers(each)

    # 2. Where an earlier, killed run left off.
    if parallel.has_state(folder):
        parallel.load_state(masters.state(), folder)
    masters.publish()

    # 3. The steps.
    started = last_saved = time.monotonic()
    saver = parallel.Saver(folder, background=device.type == "cuda")

    def store() -> None:
        seconds = state.seconds + time.monotonic() - started
        saver.save(masters.state(), asdict(state) | {"seconds": seconds})

    with watch.stop_signal() as stop:
        while len(state.curve) < schedule.steps and not watch.on_plateau(state.curve, settings.patience):
            step = len(state.curve)
            point = _step(losses, masters, state, schedule)
            if validation is not None and settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                with parallel.gathered(losses):
                    point["heldout_loss"] = quality(model, validation).loss
            state.curve.append(point)
            progress(_progress(schedule, step + 1, point))
            if watch.is_lost(state.curve):
                saver.settle()
                state = _roll_back(folder, masters, state)
                store()
            stopping = parallel.together(stop.is_set())
            due = parallel.together(time.monotonic() - last_saved >= checkpoint_seconds)
            if (stopping or due) and len(state.curve) < schedule.steps:
                # Within a bad streak there is nothing new to store, and nothing that going back to would undo.
                if "skipped" not in point:
                    store()
                    last_saved = time.monotonic()
                if stopping:
                    saver.settle()
                    raise Stopped(f"stopped after step {len(state.curve)}; run the same command again to go on")

    # 4. The result.
    saver.settle()
    record = training_record(schedule, state, state.seconds + time.monotonic() - started)
    dtypes = {name: stored.parts().dtype for name, stored in student.stored.items()}
    tensors: dict[str, Tensor | Parts] = {**masters.weights(dtypes, prefix=STUDENT)}
    if random_init:
        untrained = {name: value for name, value in anatomy.stored_tensors(model).items() if not value.requires_grad}
        tensors |= {name: parallel.whole(value).cpu() for name, value in untrained.items()}

    def write() -> None:
        others = {name: stored.parts() for name, stored in student.stored.items() if name not in tensors}
        save(to, student.config, tensors | others, like=student, extra_files={TRAINING_FILE: json.dumps(record)})
        shutil.rmtree(folder, ignore_errors=True)

    parallel.first_alone(write)
    return load(to)


def training_state(to: Path) -> Path:
    """Where an unfinished run keeps its weights and Adam's state: a folder beside its result."""
    return to.with_name(f".{to.name}.training")


def training_record(schedule: Plan, state: State, seconds: float) -> dict[str, Any]:
    """What the report shows of a training run; one point of the curve per step, but for those that were left out: their
    loss may be no number, which JSON does not know."""
    tokens = schedule.tokens_after(len(state.curve))
    steps = list(enumerate(state.curve, start=1))
    return {
        "steps": len(steps),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "events": state.events,
        "skipped_steps": [step for step, point in steps if "skipped" in point],
        "curve": [
            {"step": step, "tokens": schedule.tokens_after(step), **point}
            for step, point in steps
            if "skipped" not in point
        ],
    }


def _check(
    settings: Settings,
    schedule: Plan,
    teacher: Checkpoint | Cache | None,
    blocks: Blocks,
    pairs: hidden.Pairs | None,
    validation: Blocks | None,
) -> None:
    """Refuse what would fail, or teach the wrong thing, before anything is loaded."""
    check_shared(schedule, parallel.world().size)
    if not any(targets(*blocks.batch([number])).any() for number in range(len(blocks))):
        raise BadData("no token of the training text has another one of its document behind it: nothing can be learnt")
    if isinstance(teacher, Cache):
        found = teacher.manifest
        wrong = [
            name
            for name, is_right in {
                "text": found.text == blocks.fingerprint,
                "temperature": found.kind == "hidden" or found.temperature == settings.temperature,
            }.items()
            if not is_right
        ]
        if wrong:
            raise BadData(f"{teacher.folder} is the cache of another {', '.join(wrong)}; write one for this training")
        if settings.divergence != "forward_kl" and found.kind != "hidden":
            raise BadData(
                f"{teacher.folder} keeps {found.kind} of each distribution, which give forward_kl only; "
                f"{settings.divergence} needs the teacher itself, or a cache of its hidden states"
            )
    if settings.hidden_loss is not None and (pairs is None or not isinstance(teacher, Checkpoint)):
        raise BadData(
            "the hidden-state loss needs the teacher itself, and the pairs of layers that it compares (hidden.pairs)"
        )
    if settings.on_policy_share and not isinstance(teacher, Checkpoint):
        raise BadData("on_policy_share needs the teacher itself: a cache knows nothing of what the student will write")
    if settings.evaluate_every and validation is None:
        raise BadData("evaluate_every is set, but there is no validation text")


def _opened(teacher: Checkpoint | Cache | None, dtype: torch.dtype, device: torch.device) -> Teacher:
    if not isinstance(teacher, Checkpoint):
        return teacher or Text()
    if not parallel.world().several:
        return Live(freeze(teacher.module(dtype, device)))
    live = Live(hollow(teacher, dtype).requires_grad_(False))
    parallel.shard(live, live.model, dtype, filling(live.model, teacher, dtype))
    return live


def _masters(losses: Losses, student: Checkpoint, dtype: torch.dtype) -> Masters:
    decay = losses.settings.weight_decay
    if not parallel.world().several:
        return Masters(losses, dtype, weight_decay=decay)
    parallel.shard(losses, losses.student, dtype, filling(losses.student, student, torch.float32))
    return ShardedMasters(losses, dtype, weight_decay=decay)


def _start(student: Checkpoint, random_init: bool, seed: int, device: torch.device | None) -> PreTrainedModel:
    """A float32 model on the device; or, where its weights come there when it is sharded, without a device."""
    if random_init:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = from_config(student.config, torch.float32)
        model = hardware.place(model, device=device)
    elif device is None:
        model = hollow(student, torch.float32)
    else:
        model = student.module(torch.float32, device)
    for name, value in model.named_parameters():
        # Text says nothing of what a vision tower should see; weight decay alone would change it.
        value.requires_grad_(not name.startswith(student.family.vision))
    return model


def _step(losses: Losses, masters: Masters, state: State, schedule: Plan) -> dict[str, Any]:
    """One step, left out where its gradient is not to be trusted."""
    settings, step = losses.settings, len(state.curve)
    point = accumulate(losses, masters, state.curve, schedule)
    so_far = [each["loss"] for each in [*state.curve[: schedule.warmup_steps], point]]
    rate = state.rate_factor * learning_rate(step, schedule, settings, so_far)
    point |= {"learning_rate": rate, "norm": masters.clip(settings.clip)}
    if watch.is_bad(point, state.curve):
        point["skipped"] = True
    else:
        masters.step(rate)
    masters.forget_gradients()
    return point


def _roll_back(folder: Path, masters: Masters, state: State) -> State:
    """The last checkpoint, to go on from at half the rate."""
    if not parallel.has_state(folder) or len(state.events) >= MAX_ROLLBACKS:
        raise TrainingDiverged(
            f"the last {watch.PATIENCE} steps up to step {len(state.curve)} had no finite loss or an exploding gradient"
            + (f", after {len(state.events)} attempts at a lower rate" if state.events else "")
            + ". Lower distill.learning_rate; a teacher or text that is itself broken shows the same."
        )
    earlier = State(**parallel.load_record(folder))
    parallel.load_state(masters.state(), folder)
    masters.publish()
    event = (
        f"{watch.PATIENCE} bad steps up to step {len(state.curve)}: back to step {len(earlier.curve)}, half the rate"
    )
    return dataclasses.replace(
        earlier, events=[*state.events, event], rate_factor=state.rate_factor / 2, seconds=state.seconds
    )


def _progress(schedule: Plan, step: int, point: dict[str, Any]) -> Progress:
    values = {name: point.get(name) for name in ("loss", "learning_rate", "norm", "heldout_loss")}
    return Progress(step, schedule.steps, schedule.tokens_after(step), schedule.tokens, **values)  # type: ignore[arg-type]


def _key(
    student: Checkpoint,
    teacher: Checkpoint | Cache | None,
    blocks: Blocks,
    settings: Settings,
    random_init: bool,
    dtype: torch.dtype,
    pairs: hidden.Pairs | None,
    validation: Blocks | None,
) -> str:
    """Names everything that the weights after a step depend on."""
    source = teacher.fingerprint if isinstance(teacher, Checkpoint) else str(teacher and teacher.manifest)
    parts = [student.fingerprint, source, blocks.fingerprint, str(dataclasses.astuple(settings)), str(random_init)]
    parts += [str(dtype), str(pairs and pairs.layers), validation.fingerprint if validation else ""]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _earlier(folder: Path, key: str) -> State | None:
    """The state of an earlier run of the same, if there is one."""
    if not parallel.has_state(folder):
        return None
    state = State(**parallel.load_record(folder))
    if state.key != key:
        raise BadOutput(
            f"{folder} is an unfinished distillation with other settings, text or models. "
            "Delete it to start anew, or write to another folder."
        )
    return state


def _fitting(
    student: Checkpoint,
    teacher: Checkpoint | Cache | None,
    settings: Settings,
    schedule: Plan,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> tuple[int, int]:
    """Blocks of a micro-batch and tokens of a chunk of the loss. Raises DoesNotFit before anything is loaded."""
    need = memory.training(
        teacher if isinstance(teacher, Checkpoint) else None,
        student,
        block_size=schedule.block_size,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        ranks=parallel.world().size,
        settings=settings,
    )
    if settings.micro_blocks:
        return settings.micro_blocks, need.chunk_tokens
    found = memory.fitting(need, batch_blocks=schedule.batch_blocks)
    return parallel.first_says((found.blocks, found.chunk_tokens))
