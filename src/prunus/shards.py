"""Which files of a model's folder hold its weights, and what lies in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from prunus import checks, weights
from prunus.errors import BadCheckpoint, UnsupportedModel
from prunus.storage import Place


def places(folder: Path, name: str, unread: Iterable[str] = ()) -> list[Place]:
    """What the safetensors files hold, in the order in which it lies there.

    Args:
        unread: patterns of what transformers does not read (see `Family`): it may be of any type, as masks of old are.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)]
        if pickles:
            raise BadCheckpoint(
                f"{name}: only pickle weights ({pickles[0]}). Unpickling runs code from the file, so Prunus does not. "
                "Convert once, in a sandbox: load with transformers and save_pretrained(), which writes safetensors."
            )
        raise BadCheckpoint(f"{name}: no .safetensors file in {folder}; the download may be incomplete")
    if (folder / weights.SINGLE).is_file():
        paths = [folder / weights.SINGLE]  # as transformers does, whatever else is there
    elif (folder / weights.INDEX).is_file():
        try:
            wanted = set(json.loads((folder / weights.INDEX).read_text())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{name}: {weights.INDEX} is damaged ({error}); download it again") from error
        missing = sorted(wanted - {path.name for path in paths})
        if missing:
            raise BadCheckpoint(f"{name}: {', '.join(missing)} missing though the index names it; download it again")
        paths = [path for path in paths if path.name in wanted]
    places = []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in weights.names(path):
                    found = file.get_slice(tensor)
                    if found.get_dtype() not in weights.DTYPES:
                        if any(fnmatch(tensor, f"*.{pattern}") for pattern in unread):
                            continue
                        raise UnsupportedModel(f"{name}: {tensor} is of type {found.get_dtype()}. {checks.DEQUANTISE}")
                    places.append(Place(path, tensor, tuple(found.get_shape())))
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(
                f"{name}: {path.name} cannot be read ({error}); it is truncated or damaged, download it again"
            ) from error
    return places
