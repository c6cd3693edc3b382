"""Models of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from prunus.errors import BadCheckpoint, one_line

FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab*"]
OTHER_FORMS = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]
"""The same weights once more, as the makers of Llama, gpt-oss and Mistral run them: all folders but
additional_chat_templates/, as near as patterns can say it."""


def downloaded(model: str) -> Path:
    """The folder of a model of this id in the hub's own cache, filled where it is not yet.

    Raises:
        BadCheckpoint: no such model, or it cannot be had.
    """
    try:
        return Path(snapshot_download(model, allow_patterns=FILES, ignore_patterns=OTHER_FORMS))
    except HFValidationError as error:
        raise BadCheckpoint(f"{model}: no such file or folder, and not a hub id (owner/name)") from error
    except Exception as error:  # the hub client raises a different type for each of: offline, missing, gated, time-out
        raise BadCheckpoint(
            f"{model}: no such folder, and the hub did not give it ({type(error).__name__}: "
            f"{one_line(error)}). Check the name and the network, or give a local folder."
        ) from error
