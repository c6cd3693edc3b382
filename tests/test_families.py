"""The families' data against what transformers really builds."""

import copy
import json
import shutil

import pytest
import torch
from conftest import builder, tiny_model
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

import prunus as pr
from prunus import architecture, cost, dims, hub
from prunus.anatomy import body_of
from prunus.budget import parse_budget
from prunus.checkpoint import save
from prunus.errors import BadCheckpoint, BadRecipe, UnsupportedModel
from prunus.families import family_of, known_families
from prunus.head import head_of
from prunus.importance import score
from prunus.measure import measure
from prunus.prune import cut
from prunus.space import legal_architectures


def test_counted_parameters_are_the_real_ones(teacher):
    model = teacher.module()
    assert teacher.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(cost.parameters_by_group(teacher.family, teacher.layout, teacher.architecture).values()) == (
        teacher.parameters
    )


def test_every_parameter_has_a_rule_and_every_rule_a_known_unit(teacher):
    assert all(teacher.family.units(name, value.shape) for name, value in teacher.module().named_parameters())
    formulas = {formula for formulas in teacher.layout.values() for formula in formulas}
    assert {name for formula in formulas for name in dims.names(formula)} <= set(teacher.architecture)


def test_reads_and_writes_agree_with_the_tensor_parallel_plan(teacher):
    """transformers says which projections split their outputs (colwise) and which their inputs (rowwise)."""
    if teacher.config.base_model_tp_plan is None:
        pytest.skip("transformers has no plan for this family")
    plan = {name.split(".*.")[-1]: kind for name, kind in teacher.config.base_model_tp_plan.items()}
    for branch in teacher.family.branches:
        if branch.experts:
            assert plan[f"{branch.experts}.down_proj"] == "rowwise"
            assert plan.get(branch.write, "rowwise") == "rowwise"
        elif branch.write in plan and branch.name != "delta":  # where experts have a plan, attention may have none
            assert teacher.family.latents or all(plan[name].startswith("colwise") for name in branch.reads)
            assert plan[branch.write].startswith("rowwise")
        else:
            assert any(
                branch.experts or branch.inner in ("mamba_heads", "linear_heads") for branch in teacher.family.branches
            )


@pytest.mark.parametrize(
    ("sizes", "legal"), [({"hidden": 40}, False), ({"hidden": 42}, True), ({"heads": 4, "kv_heads": 2}, True)]
)
def test_legality_is_what_the_config_class_says(teacher, sizes, legal):
    target = teacher.architecture.replace(**sizes)
    tied = {"hidden_is_heads"} | ({"mamba_is_expand"} if "mamba_heads" in target else set())
    if tied & set(teacher.family.constraints) and "hidden" in sizes:
        assert teacher.family.illegal(target)
        return
    config = teacher.family.cut_config(teacher.config.to_dict(), target, range(target.layers))

    def accepted() -> bool:
        try:
            builder(teacher.config.model_type).from_config(type(teacher.config).from_dict(config))
        except (StrictDataclassError, ValueError):
            return False
        return True

    strict = "heads_divide_hidden" in teacher.family.constraints
    assert accepted() == (legal or not strict)
    assert accepted() or teacher.family.illegal(target)


TOLD_APART = {"gpt2": ("scale_attn_by_inverse_layer_idx",), "gpt_neox": ("use_parallel_residual",)}
"""Of types whose variants have the same weights: the options of which each value has a variant."""


def test_variants_that_compute_otherwise_are_refused(teacher, tmp_path):
    for key, value in teacher.family.requires.items():
        if key in TOLD_APART.get(teacher.config.model_type, ()):
            continue
        folder = shutil.copytree(teacher.folder, tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        other = 2 if value == 1 and value is not True else not value
        nested = teacher.family.nested
        changed = {nested: config[nested] | {key: other}} if nested else {key: other}
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(
            (UnsupportedModel, BadCheckpoint),
            match=f"contradicts|is not a valid config|it lacks|{key} is {other}|of {config['model_type']} only|no rule",
        ):
            pr.load(folder)


def test_per_layer_fields_follow_the_kept_layers(teacher):
    config = teacher.config.to_dict()
    cut = architecture.to_config(
        config,
        teacher.architecture.replace(layers=2),
        fields=teacher.family.fields,
        kept_layers=[1, 3],
        per_layer_fields=teacher.family.per_layer_fields,
        layer_count_fields=teacher.family.layer_count_fields,
        nested=teacher.family.nested,
    )
    if teacher.family.nested:
        config, cut = config[teacher.family.nested], cut[teacher.family.nested]
    for key in config.keys() & teacher.family.per_layer_fields:
        assert cut[key] == [config[key][1], config[key][3]]
    for key in teacher.family.layer_count_fields:
        assert cut[key] == sum(layer < config[key] for layer in (1, 3))
    assert type(teacher.family.text(teacher.config)).from_dict(cut).num_hidden_layers == 2


def test_any_config_may_list_the_kinds_of_its_layers(tmp_path):
    """Some do by now though their code does not read it; the class wants as many as there are layers."""
    teacher = tiny_model("llama", tmp_path, layer_types=["full_attention"] * 4)
    target = teacher.architecture.replace(layers=2)
    cut = type(teacher.config).from_dict(teacher.family.cut_config(teacher.config.to_dict(), target, [1, 3]))
    assert cut.layer_types == ["full_attention"] * 2


def test_no_token_changes_what_comes_before_it(teacher, blocks):
    model, tokens = teacher.module(torch.float32), blocks.batch([0])[0]
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 7) % 90 + 3
    with torch.no_grad():
        before, after = (body_of(model)(input_ids=each, use_cache=False).last_hidden_state for each in (tokens, other))
    assert not torch.equal(before[:, -1], after[:, -1])
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=1e-3, atol=1e-4)


def test_sizes_that_are_listed_for_each_layer_stay_so(tmp_path):
    """As Hunyuan-A13B's, whose experts' width transformers does not read where vLLM and llama.cpp do."""
    model = tiny_model("hunyuan_v1_moe", tmp_path)
    target = model.architecture.replace(layers=2, expert_ffn=16, top_k=1)
    cut = model.family.cut_config(model.config.to_dict(), target, [1, 3])
    assert cut["moe_topk"] == cut["num_shared_expert"] == [1, 1]
    assert cut["moe_intermediate_size"] == [cut["intermediate_size"]] * 2 == [16, 16]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_topk": [2, 2, 2, 1]}))
    with pytest.raises(UnsupportedModel, match=r"moe_topk in config\.json differs from layer"):
        pr.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "before", "sizes", "after"),
    [
        ("mamba2", {"intermediate_size": 96}, {"mamba_heads": 6, "hidden": 24}, {"intermediate_size": 48}),
        ("mamba", {"d_model": 48, "d_inner": 96}, {"mamba_heads": 60, "hidden": 32}, {"d_model": 32, "d_inner": 60}),
        ("gpt_oss", {"experts_per_token": 2}, {"top_k": 1}, {"experts_per_token": 1}),
        ("exaone_moe", {"is_moe_layer": [False, True, True, True]}, {"layers": 2}, {"is_moe_layer": [False, True]}),
        ("minimax_m2", {"attn_type_list": [1] * 4}, {"layers": 2}, {"attn_type_list": [1] * 2}),
    ],
)
def test_what_only_others_read_of_a_config_is_right_too(family, before, sizes, after, tmp_path):
    """As published: vLLM and llama.cpp take the width of Codestral Mamba from a key that transformers ignores."""
    file = tiny_model(family, tmp_path).folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | before))
    model = pr.load(tmp_path)
    target = model.architecture.replace(**sizes)
    cut = model.family.cut_config(model.config.to_dict(), target, range(target.layers))
    assert {key: cut[key] for key in before} == after


def test_old_configs_mean_hidden_by_heads():
    fields = family_of("llama").fields
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4).to_dict() | {"head_dim": None}
    assert architecture.from_config(config, fields).head_dim == 16


def test_unknown_family_names_the_known_ones():
    with pytest.raises(UnsupportedModel, match=", ".join(known_families())):
        family_of("gpt")


def test_arch_text_lists_all_mistakes_at_once(llama):
    with pytest.raises(BadRecipe) as error:
        architecture.parse("hiden=40,ffn=x,layers=99", llama.architecture)
    assert "did you mean 'hidden'" in str(error.value)
    assert "whole number" in str(error.value)
    assert "larger than the teacher" in str(error.value)
    assert architecture.parse("ffn=24", llama.architecture) == llama.architecture.replace(ffn=24)


def test_arch_text_of_experts(tmp_path):
    sizes = tiny_model("qwen2_moe", tmp_path).architecture
    assert architecture.parse("experts=1", sizes).top_k == 1
    assert architecture.parse("experts=4,top_k=1", sizes) == sizes.replace(experts=4, top_k=1)
    with pytest.raises(BadRecipe, match="top_k=2 of 1 experts"):
        architecture.parse("experts=1,top_k=2", sizes)


def test_flops_of_a_llama_by_hand(llama):
    a = llama.architecture
    attention = 2 * a.heads * a.head_dim * a.hidden + 2 * a.kv_heads * a.head_dim * a.hidden
    by_hand = a.layers * (attention + 3 * a.hidden * a.ffn) + a.vocab * a.hidden
    assert cost.flops_per_token(llama.family, cost.shapes(llama.family, llama.layout), a) == 2 * by_hand
    assert (
        cost.kv_bytes_per_token(llama.family, cost.shapes(llama.family, llama.layout), a)
        == 2 * a.layers * a.kv_heads * a.head_dim * 2
    )


@pytest.mark.parametrize(
    ("name", "width"), [("llama", "2 * head_dim"), ("deepseek_v3", "nope_dim + rope_dim + value_dim")]
)
def test_flops_of_looking_at_an_earlier_token(name, width, tmp_path):
    """A score and a share of the sum, of each head."""
    model = tiny_model(name, tmp_path)
    a, shapes = model.architecture, cost.shapes(model.family, model.layout)
    more = [cost.flops_per_token(model.family, shapes, a, context=context) for context in (0, 10)]
    assert more[1] - more[0] == 10 * 2 * a.layers * a.heads * eval(width, dict(a))


def test_an_axis_that_no_layer_has_forbids_nothing(blocks, tmp_path):
    """Granite's hybrids may have no attention."""
    model = tiny_model("granitemoehybrid", tmp_path, layer_types=["linear_attention"] * 4)
    budget = parse_budget(model, params="0.7x")
    target = legal_architectures(model.family, model.architecture, budget)[0]
    assert "heads" not in target
    assert cut(model, score(measure(model, blocks)), target).architecture == target


def test_the_files_are_those_that_transformers_reads(llama, tmp_path):
    """model.safetensors if it is there, whatever lies beside it."""
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    other = {name: 2 * llama.tensor(name) for name in llama.stored}
    save_file(other, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    found = pr.load(folder)
    assert all(torch.equal(found.tensor(name), llama.tensor(name)) for name in llama.stored)
    loaded = found.module().state_dict()
    assert torch.equal(loaded["model.norm.weight"], llama.tensor("model.norm.weight"))


def test_a_model_of_several_types_is_written(llama, tmp_path):
    """As transformers loads it: in the type of the config."""
    tensors = {name: llama.tensor(name).bfloat16() for name in llama.stored}
    tensors["model.norm.weight"] = torch.rand(llama.architecture.hidden)
    config = copy.deepcopy(llama.config)
    config.dtype = torch.bfloat16
    written = save(tmp_path / "model", config, tensors, like=llama)
    assert torch.equal(written.tensor("model.norm.weight"), tensors["model.norm.weight"])


def test_code_that_does_not_go_along_is_not_named(whole_model, tmp_path):
    """Phi-4-mini, DeepSeek and others bring the code of old; who trusts such code must not be sent for it."""
    folder = shutil.copytree(whole_model, tmp_path / "model")
    for name, code in [("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")]:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": {code: "other.Other"}}))
    opened = pr.load(folder)
    written = save(tmp_path / "out", opened.config, dict(opened.tensors()), like=opened)
    for kind in (AutoConfig, AutoTokenizer):
        assert kind.from_pretrained(written.folder, trust_remote_code=True)


FORMS = ("tekken.json", "spiece.model", "qwen.tiktoken", "additional_chat_templates/rag.jinja")
"""Of a tokenizer, each of which may be the only one."""


def test_every_form_of_a_tokenizer_goes_along(whole_model, tmp_path):
    folder = shutil.copytree(whole_model, tmp_path / "model")
    (folder / "tokenizer").mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in FORMS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    opened = pr.load(folder)
    written = save(tmp_path / "out", opened.config, dict(opened.tensors()), like=opened)
    assert all((written.folder / name).read_text() == name for name in FORMS)
    assert not (written.folder / "tokenizer").exists()
    assert written.tokenizer().chat_template["rag"] == FORMS[-1]


def test_what_is_taken_from_the_hub():
    """Every form of a tokenizer, and the weights once."""
    wanted = {*FORMS, "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    others = [f"{folder}/model.safetensors" for folder in ("original", "onnx", "assistant", "adapter")]
    listed = [*wanted, *others, "consolidated.safetensors", "pytorch_model.bin", "original/tokenizer.model"]
    assert set(filter_repo_objects(listed, allow_patterns=hub.FILES, ignore_patterns=hub.OTHER_FORMS)) == wanted


def test_the_factors_of_a_long_context_tie_heads_to_hidden(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64}  # fmt: skip
    plain = tiny_model("phi3", tmp_path / "plain")
    long = tiny_model("phi3", tmp_path / "long", rope_parameters=rope)
    assert not plain.family.illegal(plain.architecture.replace(heads=3, kv_heads=3))
    assert "both are cut together" in long.family.illegal(long.architecture.replace(heads=3, kv_heads=3))[0]
    found = legal_architectures(long.family, long.architecture, parse_budget(long, params="0.7x"), tolerance=0.05)
    assert len(found) > 3
    for target in found[:3]:
        type(long.config)(**long.family.cut_config(long.config.to_dict(), target, range(target.layers)))


def test_a_fingerprint_is_of_the_model_not_of_where_it_lies(llama, tmp_path):
    assert pr.load(llama.folder).fingerprint == llama.fingerprint
    moved = shutil.copytree(llama.folder, tmp_path / "moved")
    assert pr.load(moved).fingerprint == llama.fingerprint
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "6.0.0"}))
    assert pr.load(moved).fingerprint == llama.fingerprint
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert pr.load(moved).fingerprint != llama.fingerprint


def test_constraints_of_other_programs_go_to_no_type_by_inheritance():
    """As read in llama.cpp of 2026-11 and vLLM 0.33. Types whose own code has the constraint say no more."""
    families = {name: family_of(name) for name in known_families()}
    found = {
        program: {name for name, family in families.items() if program in family.elsewhere and not family.nested}
        for program in ("llama.cpp", "vLLM")
    }
    both = {"qwen2", "qwen2_moe", "jamba"}
    llama_cpp = {"cohere", "cohere2", "exaone4", "glm", "nemotron", "olmo2", "olmo3", "phi", "starcoder2"}
    assert found["llama.cpp"] == both | llama_cpp
    assert found["vLLM"] == both | {"granitemoe", "granitemoeshared", "granitemoehybrid"}


def test_the_head_gives_the_logits_of_the_model(teacher, blocks):
    """Soft-caps, factors and biases of the logits are known to the losses."""
    model, (tokens, positions) = teacher.module(torch.float32), blocks.batch([0, 1])
    with torch.no_grad():
        expected = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        states = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        torch.testing.assert_close(head_of(model).logits(states.flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("value", [None, False, True])
def test_gemma_reads_one_way(family, value, tmp_path):
    tiny_model(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": value}))
    if not value:
        assert pr.load(tmp_path).family.model_type == family
        return
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention is True"):
        pr.load(tmp_path)
