"""How good and how fast a model is: loss, divergence from the teacher, tokens per second, greedy samples.

Shapes: B blocks, S positions in a block, N valid targets, V vocabulary, H hidden.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunus import anatomy, hardware
from prunus.errors import BadCheckpoint, BadData
from prunus.head import head_of
from prunus.text import Blocks, targets

LOGIT_BYTES = 32 * 1024**2
"""Size of one float32 [chunk, vocab] tensor; about five of them live at a time."""

PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "She opened the old door and saw",
    "In the nineteenth century, most people",
)


@dataclass(frozen=True)
class Quality:
    """Next-token quality over held-out text.

    Attributes:
        loss: nats per target token.
        perplexity: exp(loss).
        bits_per_byte: bits of all targets / UTF-8 bytes that the targets stand for, see `_bytes_of_targets`.
        kl_to_teacher: mean Σ_v p_teacher (log p_teacher − log p_model) in nats per target; None without a teacher.
        top1_agreement: share of targets where teacher and model prefer the same token; None without a teacher.
        num_tokens: targets counted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    kl_to_teacher: float | None
    top1_agreement: float | None
    num_tokens: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence (batch of 1), on this machine, now."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class Sample(TypedDict):
    """A prompt and each model's greedy continuation of it."""

    prompt: str
    continuations: dict[str, str]


def quality(
    model: PreTrainedModel,
    blocks: Blocks,
    *,
    teacher: PreTrainedModel | None = None,
    batch_blocks: int = 4,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """`qualities` of one model."""
    models = {"model": model}
    return qualities(
        models, blocks, teacher=teacher, batch_blocks=batch_blocks, chunk_tokens=chunk_tokens, progress=progress
    )["model"]


def qualities(
    models: Mapping[str, PreTrainedModel],
    blocks: Blocks,
    *,
    teacher: PreTrainedModel | None = None,
    batch_blocks: int = 4,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Quality]:
    """Quality of several models over the same blocks; a module that appears twice, as the teacher may, runs once.

    Args:
        models: name → causal language model.
        blocks: held-out text, packed.
        teacher: what kl_to_teacher and top1_agreement compare with.
        batch_blocks: blocks per forward pass.
        chunk_tokens: rows of float32 logits alive at once, per model; default: what fits in LOGIT_BYTES.
        progress: called with (blocks done, blocks in all) after each batch.
    Raises:
        BadCheckpoint: a model's vocabulary has another size than the teacher's.
        BadData: no token of the blocks continues a document.
    """
    if teacher is not None:
        _check_same_vocabulary(models, teacher)
    distinct = {id(model): model for model in [*models.values(), *([] if teacher is None else [teacher])]}
    chunk_tokens = chunk_tokens or _fitting_chunk(distinct.values())
    sums, num_tokens = {name: torch.zeros(3, dtype=torch.float64) for name in models}, 0
    with evaluation_mode(distinct.values()), torch.inference_mode():
        for target_N, log_p_NV in _log_probabilities(distinct, blocks, batch_blocks, chunk_tokens, progress):
            teacher_NV = None if teacher is None else log_p_NV[id(teacher)]
            for name, model in models.items():
                sums[name] += _chunk_sums(log_p_NV[id(model)], target_N, teacher_NV)
            num_tokens += len(target_N)
    if num_tokens == 0:
        raise BadData("evaluation: no token continues a document, so there is nothing to predict; give longer texts")
    num_bytes = _bytes_of_targets(blocks, num_tokens)
    return {name: _quality(total, num_tokens, num_bytes, compared=teacher is not None) for name, total in sums.items()}


def speed(
    models: Mapping[str, PreTrainedModel], *, prompt_tokens: int = 512, new_tokens: int = 32, repeats: int = 3
) -> dict[str, Speed]:
    """Prefill and greedy decoding rate of each model.

    After a warm-up of each, the models take turns (A B A B), so that a busy moment of the machine hits all of them.
    What counts is a model's share of its turn, the median over `repeats`: the machine is faster in one turn than in
    another. The decode rate excludes the prefill; the prompt is random tokens, the same for all, and shorter where a
    model knows too few positions. Models run as transformers alone runs them, which is what a user of the checkpoint
    will see.
    """
    known = _positions(models.values())
    new_tokens = min(new_tokens, known // 2)
    prompt_tokens = min(prompt_tokens, known - new_tokens)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with hardware.plain(models.values()), evaluation_mode(models.values()), torch.inference_mode():
        for model in models.values():
            _prefill_and_decode_seconds(model, prompt_tokens, new_tokens=2)
        for _ in range(repeats):
            for name, model in models.items():
                seconds[name].append(_prefill_and_decode_seconds(model, prompt_tokens, new_tokens))
    prefill, decode = (
        _typical({name: [run[part] for run in runs] for name, runs in seconds.items()}) for part in (0, 1)
    )
    return {name: Speed(prompt_tokens / prefill[name], new_tokens / decode[name]) for name in models}


def _positions(models: Iterable[PreTrainedModel]) -> int:
    """That all of them know."""
    return min(anatomy.positions(model.config) for model in models)


def _typical(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Of each name: the median of its shares of the turns, of a turn as long as most are."""
    turns = [sum(turn) for turn in zip(*seconds.values(), strict=True)]
    whole = statistics.median(turns)
    return {
        name: whole * statistics.median(own / turn for own, turn in zip(runs, turns, strict=True))
        for name, runs in seconds.items()
    }


def samples(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 40,
) -> list[Sample]:
    """Greedy continuations, without the sampling settings that a checkpoint's generation config may hold."""
    with evaluation_mode(models.values()), torch.inference_mode():
        return [
            {
                "prompt": prompt,
                "continuations": {
                    name: _continuation(model, tokenizer, prompt, max_new_tokens) for name, model in models.items()
                },
            }
            for prompt in prompts
        ]


@contextlib.contextmanager
def evaluation_mode(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """No dropout inside; each model's mode is put back after."""
    was_training = [(model, model.training) for model in models]
    try:
        for model, _ in was_training:
            model.eval()
        yield
    finally:
        for model, training in was_training:
            model.train(training)


def _log_probabilities(
    models: Mapping[int, PreTrainedModel],
    blocks: Blocks,
    batch_blocks: int,
    chunk_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """For each chunk of targets: their tokens [N], and of each model float32 log-probabilities [N, V]."""
    for start in range(0, len(blocks), batch_blocks):
        stop = min(start + batch_blocks, len(blocks))
        tokens_BS, positions_BS = blocks.batch(range(start, stop))
        mask_BS = targets(tokens_BS, positions_BS)
        target_N = tokens_BS.roll(-1, dims=1)[mask_BS]
        hidden_NH = {key: _hidden(model, tokens_BS, positions_BS, mask_BS) for key, model in models.items()}
        for at in range(0, len(target_N), chunk_tokens):
            rows = slice(at, at + chunk_tokens)
            yield (
                target_N[rows],
                {key: head_of(model).logits(hidden_NH[key][rows]).log_softmax(-1) for key, model in models.items()},
            )
        if progress:
            progress(stop, len(blocks))


def _hidden(model: PreTrainedModel, tokens_BS: Tensor, positions_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """The head's input where there is a target, [N, H] in the model's dtype.

    Without an attention mask, transformers reads the documents' borders from the positions and keeps them apart.
    """
    device = model.device
    body = anatomy.body_of(model)(
        input_ids=tokens_BS.to(device), position_ids=positions_BS.to(device), attention_mask=None, use_cache=False
    )
    return body.last_hidden_state[mask_BS.to(device)]


def _fitting_chunk(models: Iterable[PreTrainedModel]) -> int:
    return max(1, LOGIT_BYTES // (4 * max(head_of(model).weight_VD.shape[0] for model in models)))


def _chunk_sums(log_p_NV: Tensor, target_N: Tensor, teacher_NV: Tensor | None) -> Tensor:
    """float64 [3]: Σ −log p(target), Σ KL(teacher ‖ model), number of equal preferences (0, 0 without a teacher)."""
    nll = -log_p_NV.gather(1, target_N.to(log_p_NV.device)[:, None]).sum(dtype=torch.float64).item()
    kl = agreements = 0.0
    if teacher_NV is not None:
        teacher_NV = teacher_NV.to(log_p_NV.device)
        kl = torch.linalg.vecdot(teacher_NV.exp(), teacher_NV - log_p_NV).sum(dtype=torch.float64).item()
        agreements = (teacher_NV.argmax(-1) == log_p_NV.argmax(-1)).sum().item()
    return torch.tensor([nll, kl, agreements], dtype=torch.float64)


def _bytes_of_targets(blocks: Blocks, num_targets: int) -> float:
    """The text's bytes × (targets / tokens), because the first token of a document is no target. Where that is always
    the same one, it is the mark that the tokenizer puts there and stands for no bytes: the targets stand for all."""
    firsts = np.unique(blocks.tokens[blocks.positions == 0])
    return blocks.num_bytes if len(firsts) == 1 else blocks.num_bytes * num_targets / blocks.num_tokens


def _quality(sums: Tensor, num_tokens: int, num_bytes: float, *, compared: bool) -> Quality:
    nats, kl, agreements = sums.tolist()
    return Quality(
        loss=nats / num_tokens,
        perplexity=(sums[0] / num_tokens).exp().item(),  # a diverged model gives inf, where math.exp raises
        bits_per_byte=nats / math.log(2) / num_bytes,
        kl_to_teacher=kl / num_tokens if compared else None,
        top1_agreement=agreements / num_tokens if compared else None,
        num_tokens=num_tokens,
    )


def _check_same_vocabulary(models: Mapping[str, PreTrainedModel], teacher: PreTrainedModel) -> None:
    expected = head_of(teacher).weight_VD.shape[0]
    for name, model in models.items():
        size = head_of(model).weight_VD.shape[0]
        if size != expected:
            raise BadCheckpoint(
                f"{name}: {size} tokens in the vocabulary, but the teacher has {expected}; a divergence compares two "
                "distributions over the same tokens. Evaluate this model without a teacher."
            )


def _prefill_and_decode_seconds(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompt_1S = torch.randint(vocab, (1, prompt_tokens), generator=generator).to(model.device)
    steps = _greedy(model, prompt_1S)
    times = []
    start = time.perf_counter()
    for _ in range(new_tokens + 1):
        next(steps)
        times.append(time.perf_counter())
    return times[0] - start, times[-1] - times[0]


def _greedy(model: PreTrainedModel, tokens_1S: Tensor) -> Iterator[int]:
    """The most likely next token, again and again, with a KV cache. The first step includes the prefill."""
    cache = None
    while True:
        out = model(input_ids=tokens_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens_1S = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield int(tokens_1S)  # the copy to the CPU waits for the device, so a clock around a step is right


def _continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    prompt_1S = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    max_new_tokens = max(0, min(max_new_tokens, _positions([model]) - prompt_1S.shape[1]))
    ends = _end_tokens(model)
    new = list(
        itertools.takewhile(
            lambda token: token not in ends, itertools.islice(_greedy(model, prompt_1S), max_new_tokens)
        )
    )
    # decoded together with the prompt: many tokenizers drop the space before a text's first word
    given = prompt_1S[0].tolist()
    before, after = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (given, given + new))
    return after[len(before) :]


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = (
        model.generation_config.eos_token_id if model.generation_config else model.config.get_text_config().eos_token_id
    )
    return set(ends) if isinstance(ends, list) else {ends}
