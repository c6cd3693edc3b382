"""What a student is trained on, behind one interface: a live teacher, or a cache of its outputs on disk.

    teacher = Live(model)                                        # or
    teacher = write_cache(checkpoint, blocks, describe(checkpoint, blocks), to=Path("cache"))  # once, for all students
    targets = teacher.targets(indices, tokens_BS, positions_BS)

A cache pays from the second epoch or student on, or where the teacher does not fit beside its student. Its files are
keyed by the block's number in the text, whatever the rank, batch or order in which training asks for it.

Shapes: N blocks, B batch, S tokens of a block, K samples or kept ids of a token, E channels of the teacher.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, hardware
from prunus.checkpoint import Checkpoint
from prunus.errors import BadData, BadOutput
from prunus.files import atomic_file, save_file
from prunus.frozen import freeze
from prunus.head import Dense, Head, Targets, head_of
from prunus.kernels import Samples, TopK
from prunus.text import Blocks

KINDS = ("samples", "top_k", "hidden")
SHARD_BLOCKS = 256
OPEN_FILES = 64
"""Shards that are mapped at once, since each takes a file descriptor."""
BATCH_BLOCKS = 2
ROWS = 64
"""Tokens whose probabilities are worked on at once."""
MANIFEST, HEAD = "manifest.json", "head.safetensors"


class Teacher(Protocol):
    """Where a loss gets its targets."""

    def targets(self, indices: Sequence[int], tokens_BS: Tensor, positions_BS: Tensor) -> Targets:
        """Targets of all B·S positions of the blocks `indices`, on the device of the tokens."""
        ...


class Live(nn.Module):
    """A teacher that runs beside its student; a module, so that it can be sharded as its student is."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def targets(self, indices: Sequence[int], tokens_BS: Tensor, positions_BS: Tensor) -> Dense:
        with torch.no_grad():
            hidden_BSE = self(tokens_BS, positions_BS)
        return Dense(hidden_BSE.flatten(0, 1), head_of(self.model))

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """States after the last norm, [B, S, E]."""
        output = anatomy.body_of(self.model)(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
        states_BSE: Tensor = output.last_hidden_state
        return states_BSE


class Text:
    """The text itself as the teacher: the only sample at each position is the token that follows. Cross-entropy."""

    def targets(self, indices: Sequence[int], tokens_BS: Tensor, positions_BS: Tensor) -> Samples:
        return Samples(tokens_BS.roll(-1, dims=1).flatten()[:, None])


@dataclass(frozen=True)
class Manifest:
    """What a cache holds, and of what. Two caches with equal manifests hold the same bytes.

    Attributes:
        kind: "samples": K ids a token drawn from the teacher, and the entropy of what they were drawn from, 3 K + 2
            bytes. "top_k": its K most likely ids and their probabilities, 5 K bytes. "hidden": its states after the
            last norm in bfloat16, 2 E bytes, and once its head; the only one that gives every divergence.
        per_token: K; 0 for "hidden".
        temperature: of the probabilities; 1 for "hidden".
        seed: of the samples.
        teacher, tokenizer, text: fingerprints.
        dtype: that the teacher computed in.
        num_blocks, block_size: of the text.
    """

    kind: str
    per_token: int
    temperature: float
    seed: int
    teacher: str
    tokenizer: str
    text: str
    dtype: str
    num_blocks: int
    block_size: int


@dataclass(frozen=True)
class Cache:
    """A finished cache. Files are mapped into memory and read where they are asked for."""

    folder: Path
    manifest: Manifest

    def targets(self, indices: Sequence[int], tokens_BS: Tensor, positions_BS: Tensor) -> Targets:
        device = tokens_BS.device
        parts = {name: self._rows(name, indices) for name in LAYOUT[self.manifest.kind]}
        if self.manifest.kind == "hidden":
            hidden_NE = torch.from_numpy(parts["hidden"]).view(torch.bfloat16).flatten(0, 1)
            return Dense(hidden_NE.to(device), self._head(device))
        ids_NK = torch.from_numpy(unpacked(parts["ids"])).flatten(0, 1).to(device)
        if self.manifest.kind == "samples":
            return Samples(ids_NK, torch.from_numpy(parts["entropy"]).flatten().to(device))
        return TopK(ids_NK, torch.from_numpy(parts["p"]).flatten(0, 1).to(device))

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        shards, names = -(-self.manifest.num_blocks // SHARD_BLOCKS), LAYOUT[self.manifest.kind]
        files = {number: [_shard_file(self.folder, name, number) for name in names] for number in range(shards)}
        return [number for number, wanted in files.items() if not all(file.is_file() for file in wanted)]

    def _rows(self, name: str, indices: Sequence[int]) -> np.ndarray:
        """[B, S, …] of these blocks."""
        return np.stack([self._shard(name, index // SHARD_BLOCKS)[index % SHARD_BLOCKS] for index in indices])

    @functools.lru_cache(OPEN_FILES)  # noqa: B019 — bounded, and a cache itself is small
    def _shard(self, name: str, number: int) -> np.ndarray:
        file = _shard_file(self.folder, name, number)
        try:
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise BadData(
                f"{file}: cannot be read ({error}). Delete it and write the cache again; the rest stays."
            ) from error

    @functools.lru_cache(1)  # noqa: B019 — that of the training that runs
    def _head(self, device: torch.device) -> Head:
        tensors = load_file(self.folder / HEAD, device=str(device))
        if "scale" not in tensors:
            raise BadData(
                f"{self.folder / HEAD}: of a version that left the factor on the logits out. Delete it and write the "
                "cache again; the rest stays."
            )
        softcap = tensors.get("softcap")
        own = None if softcap is None else float(softcap)
        return Head(tensors["weight"], tensors.get("bias"), own, float(tensors["scale"]))


def bytes_per_token(kind: str, *, per_token: int, hidden: int) -> int:
    """That a cache takes on the disk, beside the head in one of hidden states.

    Args:
        per_token: K.
        hidden: E.
    """
    return {"samples": 3 * per_token + 2, "top_k": 5 * per_token, "hidden": 2 * hidden}[kind]


LAYOUT = {"samples": ("ids", "entropy"), "top_k": ("ids", "p"), "hidden": ("hidden",)}
"""Arrays of each kind."""


def write_cache(
    teacher: Checkpoint,
    blocks: Blocks,
    manifest: Manifest,
    *,
    to: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Cache:
    """Run the teacher over the text once and keep what a loss needs of it. Finished shards of a killed run stay.

    Args:
        manifest: what to keep, from `describe` of the same teacher and text.
        to: folder; each file in it appears whole or not at all.
        progress: called with the tokens done and in all.
    Raises:
        BadOutput: the folder holds a cache of something else.
    """
    cache = Cache(to, manifest)
    if (to / MANIFEST).is_file():
        if different := differences(to, manifest):
            raise BadOutput(
                f"{to} holds the cache of another {', '.join(different)}. Delete it, or write to another folder."
            )
    else:
        with atomic_file(to / MANIFEST) as partial:
            partial.write_text(json.dumps(asdict(manifest), indent=2))
    missing = cache.missing_shards()
    if missing or (manifest.kind == "hidden" and not (to / HEAD).is_file()):
        hardware.keep_freed_memory()
        model = freeze(teacher.module(getattr(torch, manifest.dtype), hardware.device()))
        if manifest.kind == "hidden":
            _write_head(model, to / HEAD)
        for number in missing:
            _write_shard(cache, number, Live(model), blocks, progress)
    return cache


def open_cache(folder: Path, **expected: Any) -> Cache:
    """A cache whose manifest has the `expected` values.

    Raises:
        BadData: no cache, not a finished one, or one of another teacher, text, tokenizer or setting; says which.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text())
        manifest = Manifest(**{field.name: values[field.name] for field in fields(Manifest)})
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"{folder}: not a teacher cache ({error})") from error
    different = [name for name, value in expected.items() if getattr(manifest, name) != value]
    if different:
        raise BadData(
            f"{folder} is the cache of another {', '.join(different)}. Training on it would teach the wrong thing; "
            "write a cache for this one, or train with the teacher itself."
        )
    cache = Cache(folder, manifest)
    if missing := cache.missing_shards():
        raise BadData(f"{folder}: {len(missing)} shards are missing; run the command that writes it again")
    return cache


def describe(
    teacher: Checkpoint,
    blocks: Blocks,
    *,
    kind: str = "samples",
    per_token: int = 12,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Manifest:
    """The manifest that a cache of this teacher on this text has. What a kind does not depend on is set to a constant.

    Raises:
        ValueError: an unknown kind, or fewer than one id a token.
    """
    if kind not in KINDS:
        raise ValueError(f"no cache of kind {kind!r}; there are {', '.join(KINDS)}")
    if per_token < 1:
        raise ValueError(f"per_token is {per_token}; a token needs at least 1 id")
    whole = kind == "hidden"
    if kind == "top_k":
        per_token = min(per_token, teacher.architecture.vocab - 1)  # something must be left for the others' bucket
    return Manifest(
        kind=kind,
        per_token=0 if whole else per_token,
        temperature=1.0 if whole else temperature,
        seed=seed if kind == "samples" else 0,
        teacher=teacher.fingerprint,
        tokenizer=fingerprint_of_tokenizer(teacher),
        text=blocks.fingerprint,
        dtype=str(dtype or hardware.compute_dtype()).removeprefix("torch."),
        num_blocks=len(blocks),
        block_size=blocks.block_size,
    )


def fingerprint_of_tokenizer(teacher: Checkpoint) -> str:
    """sha256 of the tokenizer's definition."""
    tokenizer = teacher.tokenizer()
    definition = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(definition.encode()).hexdigest()


def differences(folder: Path, wanted: Manifest) -> list[str]:
    """In what the cache in this folder is another than the wanted one. Raises BadOutput if it cannot be told."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BadOutput(f"{folder / MANIFEST}: cannot be read ({error}); delete the folder") from error
    return [name for name, value in asdict(wanted).items() if found.get(name) != value]


def _shard_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05}.npy"


def _write_head(model: PreTrainedModel, file: Path) -> None:
    parts = head_of(model)
    tensors = {"weight": parts.weight_VD, "bias": parts.bias_V, "scale": torch.tensor(parts.scale, dtype=torch.float64)}
    if parts.softcap is not None:
        tensors["softcap"] = torch.tensor(parts.softcap)
    with atomic_file(file) as partial:
        present = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(present, partial, metadata={})


def _write_shard(
    cache: Cache, number: int, teacher: Live, blocks: Blocks, progress: Callable[[int, int], None]
) -> None:
    """The arrays of blocks number · SHARD_BLOCKS …, written whole."""
    first, last = number * SHARD_BLOCKS, min((number + 1) * SHARD_BLOCKS, len(blocks))
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in LAYOUT[cache.manifest.kind]}
    for start in range(first, last, BATCH_BLOCKS):
        indices = list(range(start, min(start + BATCH_BLOCKS, last)))
        tokens_BS, positions_BS = (part.to(teacher.model.device) for part in blocks.batch(indices))
        dense = teacher.targets(indices, tokens_BS, positions_BS)
        for name, values_NX in _reduced(dense, indices, cache.manifest).items():
            arrays[name].append(values_NX.reshape(len(indices), blocks.block_size, *values_NX.shape[1:]))
        progress((indices[-1] + 1) * blocks.block_size, blocks.num_tokens)
    for name, parts in arrays.items():
        with atomic_file(_shard_file(cache.folder, name, number)) as partial, partial.open("wb") as stream:
            np.save(stream, np.concatenate(parts))


def _reduced(dense: Dense, indices: Sequence[int], manifest: Manifest) -> dict[str, np.ndarray]:
    """What the cache keeps of the teacher's distribution: arrays [B·S, …]."""
    if manifest.kind == "hidden":
        return {"hidden": dense.hidden_NE.bfloat16().view(torch.int16).cpu().numpy()}
    uniform_NK = np.concatenate([_uniform(manifest, index) for index in indices])
    parts: dict[str, list[Tensor]] = {name: [] for name in LAYOUT[manifest.kind]}
    for start in range(0, len(dense), ROWS):
        p_RV = (dense.head.logits(dense.hidden_NE[start : start + ROWS]) / manifest.temperature).softmax(-1)
        if manifest.kind == "samples":
            parts["entropy"].append(torch.special.entr(p_RV).sum(-1).half())
            parts["ids"].append(draw(p_RV, torch.from_numpy(uniform_NK[start : start + ROWS]).to(p_RV.device)))
        else:
            top = p_RV.topk(manifest.per_token)
            parts["ids"].append(top.indices)
            parts["p"].append(top.values.half())
    whole = {name: torch.cat(chunks).cpu().numpy() for name, chunks in parts.items()}
    return whole | {"ids": packed(whole["ids"])}


def _uniform(manifest: Manifest, block: int) -> np.ndarray:
    """float64 [S, K] in [0, 1), a function of seed and block alone, so that any order of writing draws the same."""
    generator = np.random.Generator(np.random.Philox(key=np.array([manifest.seed, block], np.uint64)))
    return generator.random((manifest.block_size, manifest.per_token))


def draw(p_RV: Tensor, uniform_RK: Tensor) -> Tensor:
    """int64 [R, K] samples with replacement: where each uniform number falls in the running sum of p (in float64,
    since 262k float32 terms would leave their rounding as a bias on the last ids)."""
    running_RV = p_RV.double().cumsum(-1)
    return torch.searchsorted(running_RV, uniform_RK * running_RV[:, -1:], right=True).clamp_max_(p_RV.shape[1] - 1)


def packed(ids: np.ndarray) -> np.ndarray:
    """Ids as three bytes each, little-endian: uint8 […, 3]. 16.7 million ids fit."""
    return np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(*ids.shape, 4)[..., :3]


def unpacked(bytes_3: np.ndarray) -> np.ndarray:
    """int64 ids of `packed` bytes."""
    low, middle, high = (bytes_3[..., place].astype(np.int64) for place in range(3))
    return low | middle << 8 | high << 16
