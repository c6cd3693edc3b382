"""The shape of the code: a module imports only what stands above it, and the package shows the names it promises."""

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prunus as pr
from prunus.families import known_families

PACKAGE = Path(pr.__file__).parent
LAYERS = """
    errors anatomy attention faster norms rotary containers hardware losses kernels head
    dims architecture families.family families._decoder families._vision
    families._decilm families._uneven
    families._probes families._trace families._tiny families._experiments families._proof families._inferred families
    cost files frozen layerwise parallel
    sensitivity packing experts weights storage checks shards hub checkpoint source documents text scores
    weight_norms selection repair refit row_blocks fused schedule memory
    measuring measure depth importance prune pieces vocabulary shared_tokens evaluate tasks
    weight_size masters teacher hidden on_policy step watch distill trackers
    budget space search latency side_by_side tournament formats pictures verdict report
    console mistakes fields recipe sides rounds run claims positions goal comparison results choice sizes summary
    inspection written durations planning standalone pipeline cli __main__
"""
ORDER = re.split(r"\s+", LAYERS.strip())
"""A module imports only from modules before it. `families` is its __init__, which finds the files by their names."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide what stands above"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("prunus.") in ORDER else str(node.module) for name in inside}
    return {name.removeprefix("prunus.") for name in found if name.startswith("prunus.")}


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"}


FAMILIES = {name: MODULES.pop(name) for name in (f"families.{family.replace('-', '_')}" for family in known_families())}


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_data_made_of_others(family):
    assert all(name.startswith("families") for name in imported(FAMILIES[family]))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_above_it(module):
    below = {name for name in imported(MODULES[module]) if ORDER.index(name) >= ORDER.index(module)}
    assert not below


def test_algorithms_never_name_a_family():
    """Family knowledge is data: only the files in families/ know model types."""
    types = set(known_families())
    for module, file in MODULES.items():
        strings = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert module.startswith("families.") or not types & strings, module


def test_the_promised_names_are_there():
    promised = {"load", "measure", "score", "search", "prune", "distill", "quality", "compress"}
    assert promised <= set(pr.__all__)
    assert set(pr.__all__) <= set(dir(pr))
    assert all(callable(getattr(pr, name)) for name in pr.__all__)
    assert set(pr.__all__) == set(pr._HOME)


@pytest.mark.parametrize("name", ["documents", "measure", "search", "prune", "distill"])
def test_functions_are_not_hidden_by_their_modules(name):
    """`prunus.measure` is the function, before and after its module is imported in any way; both spellings agree."""
    program = f"""
import sys, types
import prunus as pr
from prunus.families import known_families
from prunus.{name} import {name} as direct
import prunus.{name}
from prunus import {name} as public
assert isinstance(sys.modules["prunus.{name}"], types.ModuleType)
assert isinstance(public, types.FunctionType)
assert public is direct is pr.{name} is sys.modules["prunus.{name}"].{name}
"""
    exec(program, {})


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'prunus' has no attribute 'mesure'"):
        _ = pr.mesure


def test_the_package_goes_to_other_processes_by_its_name():
    """Ray pickles a notebook's function with the modules that it names; a subclass of a module has no pickling."""
    assert pickle.loads(pickle.dumps(pr)) is pr


def test_importing_is_light():
    """Help, version and completion must not wait for torch and transformers, nor run any code of theirs."""
    program = """
import sys
import prunus, prunus.cli
assert not {"torch", "transformers", "datasets", "numpy"} & set(sys.modules), "heavy imports"
import prunus as pr
from prunus.families import known_families
assert callable(pr.measure) and "torch" in sys.modules
from prunus.measure import measure
assert measure is pr.measure
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_readme_names_every_family():
    named = re.search(r"## Families(.*?)## Limits", (PACKAGE.parents[1] / "README.md").read_text(), re.DOTALL)
    assert named is not None
    assert sorted(set(re.findall(r"`([a-z0-9_-]+)`", named[1])) & set(known_families())) == [*known_families()]
