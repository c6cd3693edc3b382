"""Solar Open. As dots.llm1, without dense layers and norms of queries and keys."""

import dataclasses

from prunus.families import dots1

FAMILY = dataclasses.replace(
    dots1.FAMILY,
    model_type="solar_open",
    branches=tuple(branch for branch in dots1.FAMILY.branches if branch.name != "ffn"),
    fields={size: key for size, key in dots1.FAMILY.fields.items() if size != "ffn"},
    per_layer_fields=(),
    layer_count_fields=(),
)
