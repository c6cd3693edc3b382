"""The training loop, top to bottom: a student learns its teacher's next-token distributions.

Shapes: B blocks of a micro-batch, S tokens of a block, N = B·S, H student channels, E teacher channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunus import hardware
from prunus.checkpoint import Checkpoint, save
from prunus.errors import BadData, BadOutput
from prunus.files import atomic_file, save_file
from prunus.fused import Dense, Head, divergence
from prunus.text import Blocks, batch_indices, targets

TRAINING_FILE = "training.json"
CHECKPOINT_SECONDS = 120.0
"""Time between two checkpoints of an unfinished run: what a killed run loses at the most."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a distillation; what is None is derived from the model and the amount of text.

    Attributes:
        tokens: training tokens; more than the text holds means more epochs. None: the text once.
        batch_tokens: tokens of an optimizer step. None: at least 128 steps, at most 512 blocks a step.
        micro_blocks: blocks that go through the model at once; the result does not depend on it.
        learning_rate: peak. None: 3e-4 · √(576 / hidden), which is 1.1e-4 at 4096 (Minitron, arXiv:2408.11796: 1e-4).
        final_share: learning rate at the end, as a share of the peak (cosine).
        warmup_share: share of the steps with a linearly rising learning rate.
        weight_decay: of AdamW, on matrices.
        clip: largest norm of the gradient.
        temperature: of the KL divergence.
        seed: of the order of the text.
    """

    tokens: int | None = None
    batch_tokens: int | None = None
    micro_blocks: int = 2
    learning_rate: float | None = None
    final_share: float = 0.1
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """`Settings` made concrete for one student and text."""

    steps: int
    batch_blocks: int
    block_size: int
    learning_rate: float
    warmup_steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_blocks * self.block_size


@dataclass(frozen=True)
class Progress:
    """One finished optimizer step."""

    step: int
    steps: int
    tokens: int
    total_tokens: int
    loss: float
    learning_rate: float


def plan(settings: Settings, *, hidden: int, num_blocks: int, block_size: int) -> Plan:
    """Steps, batch and learning rate. Raises BadData if the text is less than one step."""
    tokens = settings.tokens or num_blocks * block_size
    blocks = max(1, tokens // block_size)
    if settings.batch_tokens is not None:
        batch_blocks = max(1, settings.batch_tokens // block_size)
    else:
        batch_blocks = min(512, 2 ** int(math.log2(max(1, blocks // 128))))
    steps = blocks // batch_blocks
    if steps < 1:
        raise BadData(
            f"distillation needs at least one step of {batch_blocks * block_size} tokens, but there are {tokens}; "
            "give more text or a smaller batch"
        )
    rate = settings.learning_rate or 3e-4 * math.sqrt(576 / hidden)
    return Plan(steps, batch_blocks, block_size, rate, max(1, round(settings.warmup_share * steps)))


def learning_rate(step: int, plan: Plan, final_share: float) -> float:
    """Linear warm-up, then a cosine from the peak to `final_share` of it at the last step."""
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - 1 - plan.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return plan.learning_rate * (final_share + (1 - final_share) * cosine)


def distill(
    student: Checkpoint,
    teacher: Checkpoint,
    blocks: Blocks,
    *,
    to: Path | str,
    settings: Settings | None = None,
    random_init: bool = False,
    dtype: torch.dtype | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Checkpoint:
    """Train the student on the forward KL from its teacher, and write it as a plain checkpoint.

    Forward KL alone, no cross-entropy: Minitron, arXiv:2407.14679, table 12. A run that was killed goes on from its
    last checkpoint beside `to`, and ends with the same bits as an undisturbed one.

    Args:
        student: the starting point; same vocabulary as the teacher.
        blocks: training text.
        to: folder to write; appears whole or not at all.
        random_init: start from random weights of the student's shape instead (the baseline).
        dtype: of the computation (default: bfloat16 where the machine has it). Masters and Adam's state are float32.
    Raises:
        BadData: text shorter than a step. BadOutput: an unfinished run with other settings lies beside `to`.
    """
    to, settings = Path(to), settings or Settings()
    hardware.keep_freed_memory()
    schedule = plan(settings, hidden=student.architecture.hidden, num_blocks=len(blocks), block_size=blocks.block_size)
    dtype, device = dtype or hardware.compute_dtype(), hardware.device()

    # 1. The models: a frozen teacher, and a student in `dtype` with float32 masters.
    teacher_model = teacher.module(dtype, device).requires_grad_(False)
    student_model = _start(student, random_init, settings.seed, device)
    masters = _Masters(student_model, dtype)
    optimizer = _adamw(masters, settings)

    # 2. Where an earlier, killed run left off.
    key = _key(student, teacher, blocks, settings, random_init, dtype)
    saved = training_state(to)
    curve, seconds_before = _restore(saved, key, masters, optimizer)

    # 3. The steps.
    started = last_saved = time.monotonic()
    for step in range(len(curve), schedule.steps):
        rate = learning_rate(step, schedule, settings.final_share)
        indices = batch_indices(step, schedule.batch_blocks, len(blocks), settings.seed)
        loss = _accumulate(student_model, teacher_model, masters, blocks, indices, settings)
        _update(optimizer, masters, rate, settings.clip)
        curve.append({"loss": loss, "learning_rate": rate})
        progress(Progress(step + 1, schedule.steps, _tokens(schedule, step + 1), schedule.tokens, loss, rate))
        if time.monotonic() - last_saved >= checkpoint_seconds and step + 1 < schedule.steps:
            _store(saved, key, masters, optimizer, curve, seconds_before + time.monotonic() - started)
            last_saved = time.monotonic()

    # 4. The result.
    seconds = seconds_before + time.monotonic() - started
    names = student.layout
    tensors = {name: masters.values[name].detach().to("cpu", student.dtype) for name in names}
    record = training_record(schedule, curve, seconds)
    written = save(to, student.config, tensors, like=student, extra_files={TRAINING_FILE: json.dumps(record)})
    saved.unlink(missing_ok=True)
    return written


def training_state(to: Path) -> Path:
    """Where an unfinished run keeps its weights and Adam's state: beside its result."""
    return to.with_name(f".{to.name}.training.safetensors")


def training_record(schedule: Plan, curve: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """What the report shows of a training run; one point of the curve per step."""
    points = [{"step": step, "tokens": _tokens(schedule, step), **point} for step, point in enumerate(curve, start=1)]
    return {
        "steps": schedule.steps,
        "tokens": schedule.tokens,
        "seconds": seconds,
        "tokens_per_second": schedule.tokens / max(seconds, 1e-9),
        "curve": points,
    }


class _Masters:
    """float32 weights of a model that computes in a shorter type.

    Gradients of the micro-batches are added up in float32, the update happens in float32, and the model gets rounded
    copies. A model that computes in float32 is its own master.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        parameters = dict(model.named_parameters())
        self.values = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
        hardware.place(model, dtype=dtype).train()
        self.copies = dict(model.named_parameters())
        for value in self.values.values():
            value.requires_grad_(True)
            # Allocated now, so that the first step cannot run out of memory later than the rest.
            value.grad = torch.zeros_like(value)

    def collect(self) -> None:
        """Move the model's gradients onto the masters."""
        for name, copy in self.copies.items():
            gradient = self.values[name].grad
            assert gradient is not None
            if copy.grad is not None:
                gradient.add_(copy.grad)
                copy.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        for name, copy in self.copies.items():
            copy.copy_(self.values[name])


def _start(student: Checkpoint, random_init: bool, seed: int, device: torch.device) -> PreTrainedModel:
    if not random_init:
        return student.module(torch.float32, device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(student.config, dtype=torch.float32)
    return hardware.place(model, device=device)


def _adamw(masters: _Masters, settings: Settings) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; β₂ = 0.95 as is usual for language models."""
    matrices = [value for value in masters.values.values() if value.ndim >= 2]
    vectors = [value for value in masters.values.values() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _accumulate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    masters: _Masters,
    blocks: Blocks,
    indices: list[int],
    settings: Settings,
) -> float:
    """Gradients of one step on the masters. Every micro-batch is divided by the tokens of the whole step, so the
    result does not depend on the split."""
    tokens_BS, positions_BS = blocks.batch(indices)
    mask_BS = targets(tokens_BS, positions_BS)
    num_tokens = int(mask_BS.sum())
    loss = 0.0
    for micro in torch.arange(len(indices)).split(settings.micro_blocks):
        inputs = {
            "input_ids": tokens_BS[micro].to(student.device),
            "position_ids": positions_BS[micro].to(student.device),
            "use_cache": False,
        }
        with torch.no_grad():
            teacher_BSE = teacher.base_model(**inputs).last_hidden_state
        student_BSH = student.base_model(**inputs).last_hidden_state
        part = divergence(
            "forward_kl",
            student_BSH.flatten(0, 1),
            _head(student),
            Dense(teacher_BSE.flatten(0, 1), _head(teacher)),
            num_tokens=num_tokens,
            temperature=settings.temperature,
            mask_N=mask_BS[micro].flatten().to(student.device),
        )
        part.backward()
        masters.collect()
        loss += float(part.detach())
    return loss


def _head(model: PreTrainedModel) -> Head:
    head = model.get_output_embeddings()
    return Head(head.weight, getattr(head, "bias", None), getattr(model.config, "final_logit_softcapping", None))


def _update(optimizer: torch.optim.AdamW, masters: _Masters, rate: float, clip: float) -> None:
    torch.nn.utils.clip_grad_norm_(masters.values.values(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    masters.publish()


def _tokens(schedule: Plan, step: int) -> int:
    return step * schedule.batch_blocks * schedule.block_size


def _key(
    student: Checkpoint,
    teacher: Checkpoint,
    blocks: Blocks,
    settings: Settings,
    random_init: bool,
    dtype: torch.dtype,
) -> str:
    """Names everything that the weights after a step depend on."""
    parts = [student.fingerprint, teacher.fingerprint, blocks.fingerprint, str(dataclasses.astuple(settings))]
    return hashlib.sha256("|".join([*parts, str(random_init), str(dtype)]).encode()).hexdigest()


def _store(
    file: Path,
    key: str,
    masters: _Masters,
    optimizer: torch.optim.AdamW,
    curve: list[dict[str, float]],
    seconds: float,
) -> None:
    state: dict[str, Tensor] = {}
    for name, value in masters.values.items():
        moments = optimizer.state[value]
        state |= {f"weight/{name}": value.detach()}
        state |= {f"{part}/{name}": moments[part] for part in ("exp_avg", "exp_avg_sq")}
    with atomic_file(file) as partial:
        metadata = {"key": key, "curve": json.dumps(curve), "seconds": str(seconds)}
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, partial, metadata=metadata)


def _restore(
    file: Path, key: str, masters: _Masters, optimizer: torch.optim.AdamW
) -> tuple[list[dict[str, float]], float]:
    """Put a stored state back. Returns the loss curve so far (its length is the next step) and the seconds spent."""
    if not file.is_file():
        masters.publish()
        return [], 0.0
    try:
        with safe_open(file, framework="pt") as state:
            metadata: Mapping[str, str] = state.metadata()
            if metadata["key"] != key:
                raise BadOutput(
                    f"{file} is an unfinished distillation with other settings, text or models. "
                    "Delete it to start anew, or write to another folder."
                )
            curve = json.loads(metadata["curve"])
            with torch.no_grad():
                for name, value in masters.values.items():
                    value.copy_(state.get_tensor(f"weight/{name}"))
                    optimizer.state[value] = {
                        "step": torch.tensor(float(len(curve))),
                        "exp_avg": state.get_tensor(f"exp_avg/{name}").to(value.device),
                        "exp_avg_sq": state.get_tensor(f"exp_avg_sq/{name}").to(value.device),
                    }
    except SafetensorError as error:
        raise BadOutput(f"{file} cannot be read ({error}); delete it and run the command again") from error
    masters.publish()
    return curve, float(metadata["seconds"])
