"""DeepSeek-V2 and its Lite. As V3, with another router and without its corrections; Lite makes queries directly."""

import dataclasses

from prunus.families import deepseek_v3

VARIANTS = tuple(
    dataclasses.replace(
        variant,
        model_type="deepseek_v2",
        layer_weights={name: dims for name, dims in variant.layer_weights.items() if name not in variant.buffers},
        buffers=(),
        constraints=(*variant.constraints, "heads_divide_hidden", "even_latent"),
        defaults={"expert_groups": "1", "chosen_groups": "1"},
        further_layers=None,
    )
    for variant in deepseek_v3.VARIANTS
)
