"""The peers of the quality laboratory: a published method that is wrong here would flatter Prunus."""

import importlib.util

import pytest
import torch
from conftest import SIZES, tiny_model
from published import METHODS, PACKAGES, Bench, Inapplicable, depth
from published.bench import count

import prunus as pr
from prunus import anatomy
from prunus.documents import documents

pytestmark = pytest.mark.filterwarnings("default")  # of the packages of peers
OF_DEPTH = ("ShortGPT", "LaCo", "Minitron depth (M2)")
OWN_MATRICES = "SliceGPT"
"""The matrices that it adds count as its own, so it can never keep everything."""


TEACHERS = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma3_text"},
}


@pytest.fixture(scope="module", params=TEACHERS)
def bench(request, whole_model, corpus, tmp_path_factory):
    """With which a method may keep everything."""
    options = TEACHERS[request.param] | {"vocab_size": SIZES["vocab_size"]}
    teacher = tiny_model(options.pop("model_type"), tmp_path_factory.mktemp(request.param), **options)
    to, tokenizer = tmp_path_factory.mktemp("text") / "blocks", pr.load(whole_model).tokenizer()
    text = pr.tokenise(documents(str(corpus)), tokenizer, block_size=32, max_tokens=1024, to=to, label="")
    calibration, validation = text.head(24), text.select(range(24, len(text)))
    statistics = pr.measure(teacher, calibration)
    return Bench(teacher, calibration, validation, teacher.parameters, teacher.architecture, statistics)


@pytest.fixture(params=METHODS)
def method(request):
    package = PACKAGES.get(request.param)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return request.param


def made(method, bench):
    try:
        return METHODS[method](bench)
    except Inapplicable as why:
        pytest.skip(str(why))


@torch.no_grad()
def logits(model, blocks):
    tokens_BS, positions_BS = blocks.batch(range(2))
    return model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits


def test_what_may_keep_everything_computes_what_the_teacher_does(method, bench):
    if method == OWN_MATRICES:
        pytest.skip("it can never keep everything")
    expected, found = logits(bench.model(), bench.validation), logits(made(method, bench), bench.validation)
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))


def test_a_method_keeps_about_the_parameters_that_it_may(method, bench):
    shape = bench.shape.replace(layers=3, ffn=32, heads=4, kv_heads=2)
    parameters = pr.parse_budget(bench.teacher, params="0.7x").parameters(shape)
    smaller = Bench(bench.teacher, bench.calibration, bench.validation, parameters, shape, bench.statistics)
    model = made(method, smaller)
    layer = count(anatomy.layers_of(bench.model())[0])
    if method in OF_DEPTH:
        assert parameters <= count(model) < parameters + layer
    elif "not counted" not in method:
        assert parameters - layer < count(model) <= 1.02 * parameters
    assert logits(model, bench.validation).isfinite().all()


def test_laco_leaves_the_projections_of_the_last_layer_that_it_collapses(bench):
    first, _, last, *_ = anatomy.layers_of(bench.model())
    norm = first.input_layernorm.weight.clone()
    layer = depth._collapsed_layer(first, last)
    assert torch.equal(layer.self_attn.q_proj.weight, last.self_attn.q_proj.weight)
    assert torch.equal(layer.mlp.down_proj.weight, last.mlp.down_proj.weight)
    own_norms = hasattr(first.self_attn, "q_norm")  # which belong to the projections
    assert torch.equal(layer.input_layernorm.weight, last.input_layernorm.weight if own_norms else norm)
