"""A model on disk: a Hugging Face folder (or a GGUF file, dequantised once) ↔ config + tensors read on demand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from prunus import anatomy, checks, cost, hardware, packing, shards, storage, weights
from prunus.architecture import Architecture
from prunus.errors import BadCheckpoint, one_line
from prunus.families import Family, family_of, may_be_known, with_uneven_layers
from prunus.files import atomic_folder, cache_folder, copy_matching, sha256
from prunus.hub import downloaded
from prunus.storage import Stored
from prunus.weights import Parts

RELOADED_BYTES = 1024**3
"""Models up to this size are read back by transformers and compared when they have been written; of larger ones, which
may not fit in memory, only names and shapes."""
COPIED_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
                "chat_template*", "additional_chat_templates/*.jinja", "merges.txt", "vocab*", "tekken.json", "*.model",
                "*.tiktoken", "*processor_config.json", "LICENSE*"]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened model. Weights stay on disk until asked for.

    Attributes:
        folder: a plain Hugging Face folder with safetensors.
        name: what the user called it (hub id, folder or GGUF file).
        config: the transformers config.
        family: which weight carries which axis.
        architecture: the sizes.
        stored: tensor name → where it lies. A head tied to the embedding is not listed.
        layout: tensor name → unit of each dimension.
    """

    folder: Path
    name: str
    config: PreTrainedConfig
    family: Family
    architecture: Architecture
    stored: Mapping[str, Stored]
    layout: cost.Layout

    @property
    def parameters(self) -> int:
        return cost.parameters(self.family, self.layout, self.architecture)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted({place.file for tensor in self.stored.values() for places in tensor.places for place in places})

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self.stored[f"{self.family.embedding}.weight"].parts().dtype

    @property
    def positions(self) -> int:
        """See `anatomy.positions`."""
        return anatomy.positions(self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the weights and the config: names this model in scores, caches and reports, wherever it lies and
        whichever transformers reads it."""
        config = json.loads((self.folder / "config.json").read_text())
        config.pop("transformers_version", None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for file in self.files:
            digest.update(sha256(file))
        return digest.hexdigest()

    def tensor(self, name: str) -> Tensor:
        return self.stored[name].parts().whole()

    def tensors(self) -> Iterator[tuple[str, Parts]]:
        """All tensors, in the order in which they lie in the files, to be read in parts."""
        for name, stored in self.stored.items():
            yield name, stored.parts()

    def module(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> PreTrainedModel:
        """The transformers model, in evaluation mode, in `dtype` (default: as stored), on the CPU or `device`."""
        dtype = dtype or self.dtype
        if self.family.folding:
            model = self._unfolded(dtype)
        else:
            with _quiet():
                config = without_dropout(self.config)
                model = _builder(self.family).from_pretrained(self.folder, dtype=dtype, config=config)
        if self.family.ignores_positions:
            packing.separate(model)
        return hardware.place(model, device=device).eval()

    def _unfolded(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model whose layers are in memory otherwise than in the files, which transformers would not find."""
        model = self.skeleton(dtype)
        weights = {name: tensor.whole().to(dtype) for name, tensor in self.tensors()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        return model

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The same without its weights, which lie on the meta device; only its buffers are there."""
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = from_config(self.config, dtype or self.dtype)
        model.tie_weights()
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            with _quiet():
                return AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:  # missing files and damaged ones each raise their own
            raise BadCheckpoint(
                f"{self.name}: its tokenizer cannot be read ({one_line(error)}). "
                "Put tokenizer.json and tokenizer_config.json into the folder."
            ) from error


def from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model with random weights, in evaluation mode."""
    family = family_of(config.model_type, config)
    with _quiet():
        model = _builder(family).from_config(without_dropout(config), dtype=dtype)
    if family.ignores_positions:
        packing.separate(model)
    return model.eval()


def _builder(family: Family) -> Any:
    """What makes a model of this family."""
    return AutoModelForImageTextToText if family.vision else AutoModelForCausalLM


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy for a model that learns from a teacher: what is dropped at random would be noise on a full distribution.
    The config that goes with the weights keeps what it says."""
    quiet = copy.deepcopy(config)
    for part in (quiet, quiet.get_text_config()):
        for key, value in part.to_dict().items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
    return quiet


def load(model: str | Path, *, uneven: bool = False, cache: Path | None = None) -> Checkpoint:
    """Open a Hugging Face folder, a hub id, or a GGUF file.

    Args:
        model: path or hub id.
        uneven: as a model whose layers may lack attention or the FFN, of each of which depth is made then.
        cache: where a GGUF file is dequantised to (default: ~/.cache/prunus); done once per file.
    Raises:
        BadCheckpoint: missing, truncated, pickled or unreadable weights.
        UnsupportedModel: unknown model type, or a parameter that no rule covers.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        folder = _dequantised(path, cache or cache_folder())
    elif path.is_dir():
        folder = path
    elif path.exists():
        raise BadCheckpoint(f"{model}: a model is a Hugging Face folder, a hub id or a .gguf file, not a {path.suffix}")
    else:
        folder = downloaded(str(model))
    return _open_folder(folder, name=str(model), uneven=uneven)


def verify_weights(checkpoint: Checkpoint) -> None:
    """Read every tensor once and refuse weights that are not numbers.

    Raises:
        BadCheckpoint: names the tensors that hold NaN or infinity.
    """
    broken = [
        name for name, tensor in checkpoint.tensors() if not all(torch.isfinite(part).all() for part in tensor.read())
    ]
    if broken:
        raise BadCheckpoint(
            f"{checkpoint.name}: {len(broken)} tensors hold NaN or infinity ({', '.join(broken[:3])}"
            f"{', …' if len(broken) > 3 else ''}). The file is damaged or its training diverged; take another one."
        )


def save(
    folder: Path,
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor | Parts],
    *,
    like: Checkpoint,
    extra_files: Mapping[str, str | bytes] | None = None,
    stale_files: Iterable[str] = (),
) -> Checkpoint:
    """Write a plain checkpoint beside `folder`, compare it with what transformers makes of it (see `RELOADED_BYTES`),
    and only then rename it there.

    Args:
        config: of the model that `tensors` belong to.
        tensors: every parameter, a tied head left out.
        like: the model whose tokenizer, chat template and generation config go along.
        extra_files: more files, name → content; instead of those of `like`.
        stale_files: patterns of what does not go along.
    Raises:
        BadCheckpoint: what transformers loads is not, bit for bit, what was meant. BadOutput: the disk is full.
    """
    parts = {name: weights.of(tensor) for name, tensor in tensors.items()}
    with atomic_folder(folder) as partial:
        _write_model(partial, config, parts)
        written = _open_folder(partial, name=str(folder))
        _compare(written, parts, name=str(folder))
        copy_matching(like.folder, partial, COPIED_FILES)
        for pattern in stale_files:
            for file in partial.glob(pattern):
                file.unlink()
        for name, content in (extra_files or {}).items():
            (partial / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        for file in partial.glob("*_config.json"):
            _forget_code(file)
    stored = {name: tensor.moved(folder) for name, tensor in written.stored.items()}
    return dataclasses.replace(written, folder=folder, stored=stored)


def _compare(written: Checkpoint, tensors: Mapping[str, Parts], *, name: str) -> None:
    reloaded = sum(tensor.nbytes for tensor in tensors.values()) <= RELOADED_BYTES
    model = written.module() if reloaded else written.skeleton()
    found = dict(anatomy.stored_tensors(model))
    wrong = sorted(found.keys() ^ tensors.keys()) or [
        tensor
        for tensor, parts in tensors.items()
        if found[tensor].shape != parts.shape
        or (
            reloaded
            and not all(  # transformers loads every tensor in the type of the config
                torch.equal(_rows(found[tensor], rows), part.cpu().to(found[tensor].dtype))
                for rows, part in parts.numbered()
            )
        )
    ]
    if wrong:
        raise BadCheckpoint(
            f"{name}: transformers loads {wrong[0]} otherwise than it was written ({len(wrong)} tensors in all). "
            "This is a fault of Prunus or of the installed transformers; nothing was kept. Please report it."
        )


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows] if tensor.ndim else tensor


def _write_model(folder: Path, config: PreTrainedConfig, tensors: Mapping[str, Parts]) -> None:
    family = family_of(config.model_type, config)
    weights.write(folder, storage.scattered(family, tensors))
    if family.folding:
        config = family.folding.folded(config)
        shutil.copy(family.folding.code, folder / family.folding.code_name)
    else:
        config = copy.copy(config)
        # The teacher's own code does not go along; transformers would miss it where trust_remote_code is set.
        vars(config).pop("auto_map", None)
    # Runtimes choose their code by it; the config of a GGUF file, or of a body without its head, has none or another.
    config.architectures = [_builder(family)._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)


def _forget_code(file: Path) -> None:
    """Take code of its own out of a tokenizer's or processor's config."""
    values = json.loads(file.read_text())
    if values.pop("auto_map", None):
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False))


def _open_folder(folder: Path, *, name: str, uneven: bool = False) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{name}: no config.json in {folder}; a model folder has one beside its safetensors")
    with checks.valid_config(name):
        raw = json.loads((folder / "config.json").read_text())
        checks.readable(name, raw)
        if not may_be_known(raw.get("model_type", "")):
            family_of(raw.get("model_type", ""))  # says what is known
        with _quiet():
            config = AutoConfig.from_pretrained(folder)
            config = with_uneven_layers(config) if uneven else config
        family = family_of(config.model_type, config)
        config = family.folding.unfolded(config) if family.folding else config
        checks.variant(name, family, config)
        sizes = family.architecture(config)
    try:
        stored = storage.gathered(family, shards.places(folder, name, family.unread))
    except KeyError as error:
        raise BadCheckpoint(
            f"{name}: the checkpoint is incomplete, it lacks {error.args[0]}; download it again"
        ) from error
    if config.tie_word_embeddings and not storage.may_be_tied(family, stored):
        config = _untied(family, config)
        family = family_of(config.model_type, config)
    if config.tie_word_embeddings:
        stored.pop(f"{family.head}.weight", None)
    if family.further_layers and getattr(family.text(config), family.further_layers, None):
        stored = {tensor: place for tensor, place in stored.items() if (family.split(tensor)[0] or 0) < sizes.layers}
        config = _without_further_layers(family, config, family.further_layers)
    checks.rules(name, family, sizes, stored)
    layout = cost.layout(family, {tensor: place.shape for tensor, place in stored.items()})
    sizes = sizes.only(family.sizes(formula for formulas in layout.values() for formula in formulas))
    opened = Checkpoint(folder, name, config, family, sizes, stored, layout)
    with checks.valid_config(name):
        skeleton = opened.skeleton(torch.float32)  # of any type: it is not known without an embedding
    checks.complete(name, skeleton, stored)
    return opened


def _untied(family: Family, config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says what transformers does whatever it said: a head that is stored beside an embedding unlike it is
    kept. Many configs of models that see say nothing, and mean that of their decoder (Mistral Small 3.1)."""
    changed = copy.deepcopy(config)
    changed.tie_word_embeddings = family.text(changed).tie_word_embeddings = False
    return changed


def _without_further_layers(family: Family, config: PreTrainedConfig, count: str) -> PreTrainedConfig:
    """A copy whose key `count` says so: llama.cpp would look for their weights."""
    changed = copy.deepcopy(config)
    setattr(family.text(changed), count, 0)
    return changed


def _dequantised(file: Path, cache: Path) -> Path:
    """A folder with the GGUF file's weights as bfloat16 safetensors, made once and kept in the cache."""
    if not file.is_file():
        raise BadCheckpoint(f"{file}: no such file")
    folder = cache / "gguf" / f"{file.stem}-{sha256(file).hex()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bar obeys no setting of transformers
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # the reader raises whatever the damaged bytes lead it to
            raise BadCheckpoint(f"{file}: transformers cannot read this GGUF file ({error})") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are no longer quantised
    tensors = anatomy.stored_tensors(model)
    with atomic_folder(folder) as partial:
        _write_model(partial, model.config, {name: weights.of(tensor) for name, tensor in tensors.items()})
        tokenizer.save_pretrained(partial)
        GenerationConfig.from_model_config(model.config).save_pretrained(partial)
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and bars of transformers that say nothing to our user."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
