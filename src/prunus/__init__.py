"""Turn a pretrained language model into smaller ones: prune its structure, then distil from the original."""

from prunus.checkpoint import Checkpoint, load

__all__ = ["Checkpoint", "load"]
__version__ = "0.1.0"
