"""StarCoder2. LayerNorm with bias, biases everywhere, no gate."""

import dataclasses

from prunus.families._decoder import ATTENTION, FFN, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS, SQUARE, Weights
from prunus.families.family import Family

MLP: Weights = {"mlp.c_fc.weight": ("ffn", "hidden"), "mlp.c_proj.weight": ("hidden", "ffn")}

FAMILY = Family(
    model_type="starcoder2",
    layer_weights={name: dims for name, dims in PROJECTIONS.items() if "mlp" not in name} | MLP | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS | {"model.norm.bias": ("hidden",)},
    branches=(ATTENTION, dataclasses.replace(FFN, reads=("mlp.c_fc",), write="mlp.c_proj", gate="mlp.c_fc")),
    centred=True,
    elsewhere={"llama.cpp": SQUARE},
)
