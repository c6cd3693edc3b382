"""Falcon Mamba: Mamba with norms of B, C and dt, which have no weights."""

import dataclasses

from prunus.families import mamba

FAMILY = dataclasses.replace(
    mamba.FAMILY,
    model_type="falcon_mamba",
    uncut={"state": "the norms of B and C have no weight to make up for what leaves"},
)
