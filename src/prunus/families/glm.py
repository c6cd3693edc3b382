"""GLM-4. Gate and up come from one projection; biases on q, k, v; rotary on a part of each head."""

from prunus.families import phi3
from prunus.families._decoder import ATTENTION, OUTER_WEIGHTS, PRE_NORMS, PROJECTIONS, SQUARE
from prunus.families.family import Family

FAMILY = Family(
    model_type="glm",
    layer_weights={name: dims for name, dims in PROJECTIONS.items() if "mlp" not in name}
    | {name: dims for name, dims in phi3.FUSED.items() if "mlp" in name}
    | PRE_NORMS,
    outer_weights=OUTER_WEIGHTS,
    branches=(ATTENTION, phi3.FAMILY.branches[1]),
    elsewhere={"llama.cpp": SQUARE},
)
