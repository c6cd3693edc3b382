"""Qwen3.5 mixtures with their vision tower."""

from prunus.families import qwen3_5_moe_text
from prunus.families.qwen3_5 import seeing

FAMILY = seeing(qwen3_5_moe_text.FAMILY, "qwen3_5_moe")
