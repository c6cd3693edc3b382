"""Which model types of the installed transformers can be cut, which not, and why: docs/families.md.

Usage: python benchmarks/families.py > docs/families.md

Every causal language model that transformers ships is asked for, and the models that see which a file describes. What
has no file is built tiny, from its config class as it stands, and must show in that form what can be cut of it.
"""

import warnings
from collections.abc import Iterable, Sequence

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.architecture import AXES
from prunus.errors import UnsupportedModel
from prunus.families import Family, family_of, known_families, variants_of

ALIASES = ("gpt-sw3",)
"""Names for the code of another type."""


def axes(variants: Iterable[Family]) -> list[str]:
    """That some variant can be cut along."""
    found = {axis for family in variants for axis in family.fields.keys() - family.derived.keys() - family.uncut.keys()}
    return [axis for axis in AXES if axis in found]


def row(model_type: str, variants: Sequence[Family], how: str) -> str:
    fixed = "; ".join(f"{axis}: {reason.partition(' (')[0]}" for axis, reason in variants[0].uncut.items())
    return f"| `{model_type}` | {how} | {', '.join(axes(variants))} | {fixed} |"


def main() -> None:
    warnings.filterwarnings("ignore")
    supported, refused = [], []
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *known_families()} - {*ALIASES}):
        if model_type in known_families():
            supported.append(row(model_type, variants_of(model_type), "file"))
            continue
        try:
            supported.append(row(model_type, [family_of(model_type, AutoConfig.for_model(model_type))], "experiment"))
        except UnsupportedModel as error:
            reason = str(error).partition(" of it says: ")[2]
            refused.append(f"| `{model_type}` | {reason.removesuffix('. docs/add_a_family.md shows how to add it.')} |")
        except StrictDataclassError as error:
            refused.append(f"| `{model_type}` | its config class refuses its own defaults ({type(error).__name__}) |")
    by_file = len(known_families())
    print(
        f"""# Model types

Of transformers {transformers.__version__}: {len(supported)} types can be cut, {by_file} by a file of data in
`src/prunus/families/` and {len(supported) - by_file} by experiment on a tiny model; {len(refused)} of its causal
language models cannot. `python benchmarks/families.py > docs/families.md` writes this page.

What goes by experiment is proven each time that such a model is opened, with the options of its own config: a tiny
model with parts set to zero must compute what one without these parts does, axis by axis and together.

| type | by | axes | what cannot be cut, and why |
|---|---|---|---|"""
    )
    print("\n".join(supported))
    print("\n## Not supported\n\n| type | what a tiny model of it shows |\n|---|---|")
    print("\n".join(refused))


if __name__ == "__main__":
    main()
