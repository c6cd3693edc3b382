"""Every mistake of the user's: exit code 2, a message that names the thing and the way out, and a disk as it was."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, make_text, small_flags
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_pipeline import make_recipe

from prunus import pipeline, recipe, weights
from prunus.claims import claim
from prunus.families import known_families
from prunus.pipeline import compress
from prunus.recipe import STAGES
from prunus.run import OUTPUTS, Run

INDEXED = pytest.mark.slow
"""lm-eval takes a quarter of a minute to list its tasks."""
STAGE_LINE = re.compile(rf"({'|'.join(STAGES)}): [\d.]+ s")


@pytest.fixture
def model(whole_model, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole_model, tmp_path / "model")


@pytest.fixture
def refused(invoke, corpus, tmp_path) -> Callable[..., str]:
    """Runs `prunus compress` with a mistake in it; returns the message, after the checks that all of them share."""

    def run(source: Path | str, *options: str, data: Path = corpus, budget: tuple[str, ...] = ("--params", "0.7x")):
        before = contents(tmp_path)
        result = invoke("compress", str(source), *small_flags(data, tmp_path / "run", budget=budget), *options)
        assert result.exit_code == 2, result.stderr
        assert contents(tmp_path) == before
        return only_message(result)

    return run


def test_a_folder_that_is_not_empty_is_left_as_it_was(invoke, whole_model, corpus, tmp_path):
    """Such as a fresh git repository that is meant to hold the run."""
    root = tmp_path / "run"
    (root / ".git").mkdir(parents=True)
    (root / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (root / ".env").write_text("HF_HOME=/models")
    before = contents(root)
    flags = small_flags(corpus.with_name("nothing.jsonl"), root)
    assert invoke("compress", str(whole_model), *flags).exit_code == 2
    assert contents(root) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file and folder but the lock of a run and its record of times."""
    paths = (path for path in folder.rglob("*") if path.name not in (".lock", "run.json"))
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(paths)}


def only_message(result) -> str:
    """The error on stderr. Before it come the lines of finished stages alone: no bar, no warning, no traceback."""
    lines = [line for line in result.stderr.splitlines() if not STAGE_LINE.fullmatch(line)]
    assert lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return "\n".join(lines)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def reconfigure(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------------------------------------- models


def test_a_folder_without_weights(model, refused):
    (model / "model.safetensors").unlink()
    assert re.search(r"model: no \.safetensors file in .*; the download may be incomplete", refused(model))


def test_an_index_that_names_a_missing_shard(model, refused):
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = list(load_file((model / "model.safetensors").rename(model / shards[0])))
    index = {"weight_map": dict.fromkeys(names, shards[0]) | {names[0]: shards[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors missing though the index names it; download it again" in refused(model)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(model, refused, index):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json is damaged" in refused(model)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights(model, refused, kept):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors cannot be read" in (message := refused(model))
    assert "download it again" in message


def test_a_tensor_of_another_shape(model, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: torch.zeros(41, 48)}))
    assert f"{name} has shape [41, 48], which config.json" in refused(model)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_layer_that_lacks_a_tensor(model, refused, layer):
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    rewrite(model, lambda tensors: tensors.pop(name))
    assert f"the checkpoint is incomplete, it lacks {name}" in refused(model)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_model_that_lacks_an_outer_tensor(model, refused, name):
    rewrite(model, lambda tensors: tensors.pop(name))
    assert f"it lacks {name}" in refused(model)


def test_fewer_and_more_layers_than_the_config_says(model, refused):
    reconfigure(model, num_hidden_layers=5)
    assert re.search(r"it lacks model\.layers\.4\.\S+ and 8 more tensors", refused(model))
    reconfigure(model, num_hidden_layers=3)
    assert "there is model.layers.3." in refused(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(model, refused, value):
    rewrite(model, lambda tensors: tensors["model.norm.weight"][3:4].fill_(value))
    assert "1 tensors hold NaN or infinity (model.norm.weight)" in refused(model)


def test_an_unknown_model_type(model, refused):
    reconfigure(model, model_type="mambo")
    message = refused(model)
    assert "'mambo' is not supported" in message
    assert all(family in message for family in known_families())


def test_a_type_that_works_otherwise_says_how_far_it_came(model, refused):
    reconfigure(model, model_type="bloom")
    assert re.search("'bloom' is not supported: no file describes it, and a tiny model of it says: .+", refused(model))


def test_a_model_with_its_own_code(model, refused):
    reconfigure(model, model_type="newmodel", auto_map={"AutoModelForCausalLM": "modeling_new.NewForCausalLM"})
    message = refused(model)
    assert "'newmodel' comes with its own code (AutoModelForCausalLM), which Prunus does not run" in message


def test_quantised_weights(model, refused):
    reconfigure(model, quantization_config={"quant_method": "awq", "bits": 4})
    message = refused(model)
    assert "its weights are quantised (awq)" in message
    assert "start from the model that this one was quantised from" in message


def test_weights_of_a_quantised_type_without_a_word_of_it(model, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: torch.ones(40, 48, dtype=torch.int8)}))
    assert f"{name} is of type I8. Prunus cuts weights in full precision" in refused(model)


def test_a_tied_head_that_is_stored_too(model, invoke):
    rewrite(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    reconfigure(model, tie_word_embeddings=True)
    assert invoke("inspect", str(model)).exit_code == 0


@pytest.mark.parametrize(
    "config",
    [
        *("{", "[]", "3", '{"model_type": ["llama"]}', '{"model_type": "llama", "hidden_size": "wide"}'),
        *('{"model_type": "llama", "num_attention_heads": 0}', '{"model_type": "jamba", "attn_layer_period": 0}'),
        '{"model_type": "nemotron-nas", "block_configs": 3}',
        '{"model_type": "nemotron-nas", "block_configs": [{"attention": {}}]}',
    ],
)
def test_a_damaged_config(model, refused, config):
    (model / "config.json").write_text(config)
    assert "config.json is not a valid config" in refused(model)


@pytest.mark.parametrize("changes", [{"hidden_act": "sillu"}, {"pad_token_id": 999}])
def test_a_config_that_no_model_can_be_made_of(model, refused, changes):
    reconfigure(model, **changes)
    assert "config.json is not a valid config" in refused(model)


def test_a_variant_with_a_parameter_that_no_rule_covers(model, refused):
    name = "model.layers.0.self_attn.sinks"
    rewrite(model, lambda tensors: tensors.update({name: torch.zeros(6)}))
    message = refused(model)
    assert f"has no rule for 1 tensors, such as {name!r}" in message
    assert "would damage it silently" in message


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self):
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_opened(model, refused, tmp_path, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "crater")))
    assert f"only pickle weights ({name})" in (message := refused(model))
    assert "save_pretrained()" in message
    assert not (tmp_path / "crater").exists()


def test_what_is_no_model(refused, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    assert "a model is a Hugging Face folder, a hub id or a .gguf file, not a .jsonl" in refused(corpus)
    assert "nowhere: no such file or folder: neither a run, a recipe nor a model" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "nosuch"])
def test_a_hub_id_without_the_hub(refused, name):
    message = refused(name)
    assert f"{name}: no such folder, and the hub did not give it" in message
    assert "Check the name and the network, or give a local folder" in message


def test_a_model_without_a_tokenizer(model, refused):
    for file in model.glob("*token*"):
        file.unlink()
    assert "its tokenizer cannot be read" in (message := refused(model))
    assert "tokenizer.json" in message


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 200, b"not a model" * 99])
def test_a_damaged_gguf(refused, tmp_path, tmp_path_factory, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf: transformers cannot read this GGUF file" in refused(tmp_path / "model.gguf")


def test_a_gguf_that_is_not_there(refused, tmp_path):
    assert "model.gguf: no such file" in refused(tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--params", "100", "the smallest legal model of this family costs"),
        ("--params", "1.2x", "but the model has"),
        ("--params", "7B", "but the model has"),
        ("--memory", "1TB", "is not a quantity"),
        ("--latency", "0.6", "did you mean 0.6x"),
        ("--latency", "1.5x", "latency: 1.5x is more than the model takes; pruning only removes"),
        ("--latency", "40MB", "'40MB' is not a quantity such as 40ms, nor a share"),
        ("--kv-cache", "0.001x", "the smallest legal model of this family costs"),
        ("--memory", "1GB", "000 bytes, but the model has"),
        ("--params", "0.7", "did you mean 0.7x"),
        ("--memory", "0", "but the model has"),
        ("--params", "some", "'some' is not a quantity such as 200k, 95M or 180MB, nor a share"),
        ("--arch", "hidden=40", "hidden must be a multiple of heads"),
        ("--arch", "kv_heads=2,heads=5", "heads must be a multiple of kv_heads"),
        ("--arch", "kv_heads=1", "6 heads in 1 groups need 6 heads per group, but the teacher's groups have 2"),
        ("--arch", "hiden=24", "unknown axis 'hiden'; did you mean 'hidden'?"),
        ("--arch", "ffn=41", "ffn=41 is larger than the teacher's 40; pruning only removes"),
        ("--arch", "ffn=0", "ffn must be a whole number of at least 1, not '0'"),
        ("--arch", "ffn=²", "ffn must be a whole number of at least 1, not '²'"),
        ("--arch", "ffn", "ffn must be a whole number of at least 1, not ''"),
    ],
)
def test_budgets(whole_model, refused, option, value, words):
    assert words in refused(whole_model, budget=(option, value))


def test_every_mistake_in_an_architecture_is_named(whole_model, refused):
    message = refused(whole_model, budget=("--arch", "hiden=24,ffn=41,heads=two"))
    assert all(words in message for words in ("'hiden'", "ffn=41", "'two'"))


def test_an_architecture_beside_a_budget_and_none_of_both(whole_model, refused):
    assert "nothing left for params and flops to decide" in refused(whole_model, "--arch", "ffn=24", "--flops", "0.5x")
    assert "a budget is needed: one or several of params, memory," in refused(whole_model, budget=())


# ---------------------------------------------------------------------------------------------- text


def write(content: str | bytes, name: str) -> Callable[[Path], Path]:
    def to(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return to


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "absent.txt", "absent.txt: no such file or folder"),
        (write("", "empty.txt"), "it is empty"),
        (write(" \n" * 40, "blank.txt"), "it is empty"),
        (write("", "empty.jsonl"), "it is empty"),
        (write(bytes(range(256)) * 9, "binary.txt"), "binary.txt: not UTF-8 text but binary"),
        (write(b"\x80PNG\xff" * 99, "picture.jsonl"), "picture.jsonl"),
        (write("x" * 99, "table.xlsx"), "a .xlsx is not text"),
        (write('{"text": "a tree"}\n{"text": "a cat\n', "broken.jsonl"), "broken.jsonl: broken JSON (line 2"),
        (write('{"a": "x", "b": "y"}\n', "fields.jsonl"), "no column 'text' that holds text. Columns: a (text), b"),
        (lambda folder: make_text(folder / "short.jsonl", 3, seed=0), "too short"),
    ],
)
def test_texts(whole_model, refused, tmp_path, make, words):
    assert words in refused(whole_model, data=make(tmp_path))


def test_a_wrong_text_field(whole_model, refused, corpus):
    message = refused(whole_model, "--set", "data.text_field=body")
    assert f"{corpus}: no column 'body' that holds text. Columns: text (text)" in message


@pytest.mark.parametrize("nested", [False, True])
def test_heldout_text_that_is_trained_on(whole_model, refused, corpus, nested):
    data = corpus.parent if nested else corpus
    message = refused(whole_model, "--heldout", str(corpus), data=data)
    assert f"data: heldout: {corpus} is trained on too, as {data}; leave heldout away" in message


def test_a_heldout_file_that_is_not_there(whole_model, refused):
    assert "absent.txt: no such file or folder" in refused(whole_model, "--heldout", "absent.txt")


# ---------------------------------------------------------------------------------------------- recipes


def test_every_mistake_in_a_recipe_is_named(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: x\ndistil: {tokens: 3}\nscore: {ffn: magnitud}\nprune: {repair: perhaps}\n"
    )
    message = refused(tmp_path / "recipe.yaml")
    assert "recipe.yaml: 3 mistakes" in message
    assert "unknown key 'distil'; did you mean 'distill'?" in message
    assert "score.ffn: 'magnitud' is unknown; did you mean 'magnitude'?" in message
    assert "prune.repair: Input should be a valid boolean" in message


def test_the_budget_is_named_along_with_other_mistakes(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: x\nbaselin: true\n")
    message = refused(tmp_path / "recipe.yaml", budget=())
    assert "2 mistakes" in message
    assert "did you mean 'baseline'?" in message
    assert "a budget is needed" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- one\n- two\n", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
        ("model: [unclosed", "not readable as YAML"),
        (b"\xff\xfe\0", "not readable as YAML"),
        ("model: x\nevaluate: 2024-01-01\n3: 4\n", "3: Keys should be strings"),
    ],
)
def test_what_is_no_recipe(refused, tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in refused(tmp_path / "recipe.yaml")


def test_a_recipe_that_is_not_there(refused, tmp_path):
    assert "recipe.yaml: no such recipe" in refused(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stop-after", "distil"), "stop_after: 'distil' is unknown; did you mean 'distill'?"),
        (("--stop-after", "zzz"), "one of text, measure, score, search, prune, distill, evaluate, report"),
        (("--set", "distill.learning_rat=1"), "key 'distill.learning_rat'; did you mean 'distill.learning_rate'?"),
        (("--set", "distill.learning_rate"), "write KEY=VALUE"),
        (("--set", "prune.repair=["), "the value is not YAML"),
        (("--set", "measure=3"), "measure: "),
        (("--set", "data.block_size=10Q"), "data.block_size: '10Q' is not a quantity"),
        (("--set", "score.layers=leave_one_out"), "measure.leave_one_out"),
        (("--set", "distill.seed=-1"), "distill.seed: Input should be greater than or equal to 0"),
        (("--set", "distill.teacher_cache=false"), "distill.teacher_cache: 'False' is unknown; one of samples"),
        (("--set", "distill.trackers=[false]"), "'False' is unknown; one of tensorboard"),
        (("--set", "distill.tokens=true"), "distill.tokens: True is not a number"),
        (("--set", f"distill.tokens={'9' * 400}B"), "is more than any quantity"),
        (("--set", f"distill.seed={10**22}"), "distill.seed"),
        (("--set", "data.heldout=~nobody-here/x"), "data: ~nobody-here/x"),
        (("--set", "to=2026-13-01"), "the value is not YAML"),
        (("--set", "data.block_size=1"), "data.block_size: Input should be greater than or equal to 2"),
        (("--set", "distill.divergence=jsd", "--set", "distill.teacher_cache=top_k"), "top_k give forward_kl only"),
        (("--set", "distill.hidden_loss=mse", "--set", "distill.teacher_cache=hidden"), "hidden_loss: a cache has"),
        (("--set", "evaluate.prompts=['']"), "evaluate.prompts.0: String should have at least 1 character"),
        pytest.param(("--set", "evaluate.tasks=[arc_esay]"), "knows no task 'arc_esay'", marks=INDEXED),
        (("--set", "data.block_size=4096"), "data.block_size: 4096 tokens, but the model knows 128 positions"),
    ],
)
def test_options(whole_model, refused, options, words):
    assert words in refused(whole_model, *options)


@pytest.mark.parametrize("query", ["{{ q + n }}", "{{ n / 0 }}", "{{ range(q) }}"])
def test_a_task_whose_template_fails_on_its_row(whole_model, refused, tmp_path, query):
    (tmp_path / "task.jsonl").write_text(json.dumps({"q": "a", "n": 1, "choices": ["a", "b"], "gold": 0}) + "\n")
    task = {"name": "mine", "file": str(tmp_path / "task.jsonl"), "query": query, "choices": "choices", "gold": "gold"}
    assert f"query {query!r}" in refused(whole_model, "--set", f"evaluate.tasks=[{json.dumps(task)}]")


def test_a_task_that_is_not_utf8(whole_model, refused, tmp_path):
    (tmp_path / "task.jsonl").write_bytes(b'{"q": "\xff"}\n')
    task = {"name": "mine", "file": str(tmp_path / "task.jsonl"), "query": "{{ q }}", "choices": "c", "gold": "g"}
    assert "is not JSON lines" in refused(whole_model, "--set", f"evaluate.tasks=[{json.dumps(task)}]")


def test_a_data_set_of_the_hub_without_an_end(invoke, whole_model, tmp_path):
    options = ("--teacher", str(whole_model), "--data", "owner/all-of-it", "--to", str(tmp_path / "student"))
    result = invoke("distill", str(whole_model), *options)
    assert result.exit_code == 2
    assert "say how much of it to read" in result.stderr
    result = invoke("distill", str(whole_model), *[word.replace("all-of-it", "typo.jsonl") for word in options])
    assert result.exit_code == 2
    assert "owner/typo.jsonl: no such file or folder" in result.stderr


def test_an_unknown_option_and_command(invoke, whole_model):
    for arguments in (("compress", str(whole_model), "--parms", "0.7x"), ("compres", str(whole_model))):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        assert "compress" in result.stderr or "--params" in result.stderr


# ---------------------------------------------------------------------------------------------- output folders


@pytest.fixture
def started(invoke, model, corpus, tmp_path) -> list[str]:
    """A run that stopped after its scores; returns its command."""
    command = ["compress", str(model), *small_flags(corpus, tmp_path / "run"), "--stop-after"]
    assert invoke(*command, "score").exit_code == 0
    return [*command, "prune"]


@pytest.fixture(scope="module")
def whole_run(whole_model, corpus, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    return compress(make_recipe(whole_model, corpus, tmp_path_factory.mktemp("whole_run") / "run")).root


def stopped(invoke, command: list[str], root: Path) -> str:
    """The message of a command that must fail and leave the finished stages as they are."""
    before = contents(root)
    result = invoke(*command)
    assert result.exit_code == 2, result.stderr
    after = contents(root)
    assert {path: after.get(path) for path in before if path.name != "recipe.yaml"}.items() <= before.items()
    assert not [path for path in after if "partial" in path.name]
    return only_message(result)


def test_a_folder_with_other_files(whole_model, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "holds files that Prunus did not write (thesis.txt). Give a new folder" in refused(whole_model)


def test_an_empty_folder_stays(refused, tmp_path, whole_model):
    (tmp_path / "run").mkdir()
    assert "empty.txt" in refused(whole_model, data=write("", "empty.txt")(tmp_path))


def test_an_output_that_is_a_file(whole_model, refused, tmp_path):
    (tmp_path / "run").write_text("")
    assert "run is a file; give a folder" in refused(whole_model)


@pytest.mark.parametrize("command", ["compress", "evaluate", "distill", "vocabulary"])
def test_the_home_of_nobody(invoke, whole_model, tmp_path, command):
    nobody, to = "~nobody-at-all/text.jsonl", ["--to", str(tmp_path / "out")]
    flags = {
        "compress": ["--params", "0.7x", "--set", "data.block_size=32", *to],
        "evaluate": [],
        "distill": ["--teacher", str(whole_model), *to],
        "vocabulary": ["--size", "60", *to],
    }
    result = invoke(command, str(whole_model), "--data", nobody, *flags[command])
    assert result.exit_code == 2
    assert f"{nobody}: no such file or folder" in only_message(result)
    assert not (tmp_path / "out").exists()
    assert "no such file or folder" in only_message(invoke("compress", "~nobody-at-all/model", *flags["compress"]))


def test_a_task_that_is_not_known_is_refused_before_anything_is_measured(invoke, whole_model, corpus, monkeypatch):
    pytest.importorskip("lm_eval", reason="tasks are run by lm-eval")
    monkeypatch.setattr("prunus.standalone.quality", lambda *_, **__: pytest.fail("measured"))
    result = invoke("evaluate", str(whole_model), "--data", str(corpus), "--tasks", "arc_esay")
    assert "knows no task 'arc_esay'" in only_message(result)


def test_a_folder_in_use(invoke, started, tmp_path):
    with FileLock(tmp_path / "run" / ".lock"):
        assert "is in use by another prunus process" in stopped(invoke, started, tmp_path / "run")
    assert invoke(*started).exit_code == 0


def test_a_changed_recipe(invoke, started, tmp_path):
    message = stopped(invoke, [*started, "--set", "measure.tokens=256"], tmp_path / "run")
    assert "was made with another recipe (changed: measure.tokens, measure)" in message
    assert "stages text, measure, score depend on" in message
    assert "--redo" in message


def test_an_impossible_goal_takes_no_results_away(invoke, started, tmp_path):
    assert invoke(*started).exit_code == 0
    command = ["prune", str(tmp_path / "run"), "--redo", "--arch", "hidden=40"]
    assert "hidden must be a multiple of heads" in stopped(invoke, command, tmp_path / "run")
    assert (tmp_path / "run" / "3-pruned" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("compress", "--redo", "--data", "typo.jsonl"), "typo.jsonl: no such file or folder"),
        (("compress", "--redo", "--set", "data.text_field=body"), "no column 'body' that holds text"),
        pytest.param(
            ("prune", "--set", "distill.batch_tokens=64", "--set", "measure.contiguous_by_task=arc_esay"),
            "knows no task",
            marks=INDEXED,
        ),
        pytest.param(("evaluate", "--tasks", "arc_esay"), "knows no task 'arc_esay'", marks=INDEXED),
        (("distill", "--set", "distill.batch_tokens=1M"), "distillation needs at least one step of 1000000 tokens"),
        (("distill", "--teacher", "other"), "--teacher: "),
        (("evaluate", "--data", "other.jsonl"), "--data: a run is measured on its own held-out text"),
    ],
)
def test_a_mistake_in_a_changed_recipe_takes_no_results_away(invoke, whole_run, changes, words):
    command, *options = changes
    before = contents(whole_run)
    result = invoke(command, str(whole_run), *options)
    assert result.exit_code == 2, result.stdout
    assert contents(whole_run) == before
    assert words in only_message(result)


def test_text_of_a_refused_recipe_is_not_taken_for_that_of_the_one_before(invoke, whole_model, corpus, tmp_path):
    """Its training text was there already when its held-out text was found wanting."""
    other, empty = make_text(tmp_path / "other.jsonl", 400, seed=7), write("", "empty.txt")(tmp_path)
    command = ["compress", str(whole_model), *small_flags(corpus, tmp_path / "run"), "--stop-after", "text"]
    assert invoke(*command).exit_code == 0
    before = contents(tmp_path / "run")
    refused = invoke(*command, "--redo", "--data", str(other), "--heldout", str(empty))
    assert "empty.txt" in only_message(refused)
    assert contents(tmp_path / "run") == before


def test_a_training_that_cannot_begin_takes_no_results_away(invoke, whole_run):
    before = contents(whole_run)
    options = ["--params", "0.8x", "--set", "distill.batch_tokens=1M", "--redo"]
    assert "at least one step of" in only_message(invoke("compress", str(whole_run), *options))
    assert contents(whole_run) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_redo_that_breaks_off_at_once_takes_no_results_away(whole_run, monkeypatch, error):
    def broken(_: object) -> None:
        raise error

    before = contents(whole_run)
    again = Run(whole_run, recipe.parse(recipe.read_yaml(whole_run / "recipe.yaml"), source="test")).recipe
    monkeypatch.setitem(pipeline.RUN_STAGE, "measure", broken)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        compress(again.model_copy(update={"measure": again.measure.model_copy(update={"task_rows": 100})}), redo=True)
    assert contents(whole_run) == before


def test_a_redo_that_is_killed_at_once_takes_no_results_away(whole_model, corpus, whole_run, tmp_path):
    root = shutil.copytree(whole_run, tmp_path / "run")
    before = contents(root)
    changed = make_recipe(whole_model, corpus, root, distill=SMALL["distill"] | {"learning_rate": 0.01})
    taken = claim(Run(root, changed), redo=True)
    with taken:
        assert not (root / "4-distilled").exists()
        killed = shutil.copytree(root, tmp_path / "killed")
    shutil.rmtree(root)
    shutil.move(killed, root)
    unchanged = make_recipe(whole_model, corpus, root)
    compress(unchanged)
    assert contents(root).keys() == before.keys()
    assert (root / "4-distilled/model.safetensors").read_bytes() == before[root / "4-distilled/model.safetensors"]


def test_several_sizes_take_no_run_over_nor_the_other_way_round(invoke, whole_model, corpus, whole_run, tmp_path):
    before = contents(whole_run)
    several = small_flags(corpus, whole_run, budget=("--params", "0.9x,0.8x"))
    result = invoke("compress", str(whole_model), *several)
    assert "is a run of one size; give a new folder" in only_message(result)
    assert contents(whole_run) == before

    root = tmp_path / "sizes"
    several = [*small_flags(corpus, root, budget=("--params", "0.9x,0.8x")), "--stop-after", "score"]
    assert invoke("compress", str(whole_model), *several).exit_code == 0
    before = contents(root)
    result = invoke("compress", str(whole_model), *small_flags(corpus, root))
    assert "holds runs of several sizes; give a new folder" in only_message(result)
    assert contents(root) == before
    refused = invoke("compress", str(whole_model), *several, "--set", "distill.learning_rate=0.01")
    assert refused.exit_code == 2
    assert "was made with another recipe" in refused.stderr
    assert contents(root) == before
    assert "0.9x and 0.8x not evaluated yet" in only_message(invoke("report", str(root)))


def test_several_sizes_that_cannot_begin_leave_nothing(invoke, whole_model, tmp_path):
    empty = write("", "empty.txt")(tmp_path)
    flags = small_flags(empty, tmp_path / "sizes", budget=("--params", "0.9x,0.8x"))
    assert invoke("compress", str(whole_model), *flags).exit_code == 2
    assert not (tmp_path / "sizes").exists()


def test_a_start_of_another_vocabulary(invoke, whole_model, corpus, refused, tmp_path_factory):
    cut, out = (tmp_path_factory.mktemp("cut") / name for name in ("model", "out"))
    result = invoke("vocabulary", str(whole_model), "--size", "60", "--data", str(corpus), "--to", str(cut))
    assert result.exit_code == 0, result.stderr
    for message in (
        refused(whole_model, "--set", f"start={cut}"),
        only_message(invoke("evaluate", str(cut), "--data", str(corpus), "--teacher", str(whole_model))),
        only_message(
            invoke("distill", str(cut), "--teacher", str(whole_model), "--data", str(corpus), "--to", str(out))
        ),
    ):
        assert "ids stand for the same token in both; a student needs its teacher's tokenizer" in message
    assert not out.exists()


def test_a_changed_teacher(invoke, started, model, tmp_path):
    rewrite(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    message = stopped(invoke, started, tmp_path / "run")
    assert f"was made with other weights of {model}" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1-scores.safetensors", "1-scores.safetensors: not a file of Prunus, or damaged"),
        ("0-text/train/tokens.npy", "0-text/train: not a folder of tokenised text, or a damaged one"),
        ("run.json", "run.json: damaged"),
        ("recipe.yaml", "recipe.yaml: "),
    ],
)
def test_damaged_results_of_a_stage(invoke, started, tmp_path, name, words):
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:50])
    assert words in stopped(invoke, started, tmp_path / "run")


# ---------------------------------------------------------------------------------------------- disks


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own."""
    folder = tmp_path / "disk"

    def make(options: str) -> Path:
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small disk is not permitted here")
        return folder

    with contextlib.suppress(FileNotFoundError):  # no `mount` on this system
        yield make
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True) if folder.is_dir() else None


def test_too_little_space_for_the_next_stage(invoke, started, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        message = stopped(invoke, started, tmp_path / "run")
    assert re.search(r"run: the pruned model needs 0\.00 GB, but the disk has 0\.00 GB free\. Free some space", message)
    assert "finished stages are kept" in message
    assert invoke(*started).exit_code == 0


def test_the_disk_fills_up_while_weights_are_written(invoke, started, tmp_path, monkeypatch):
    def write_half(folder: Path, _: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "write", write_half)
        message = stopped(invoke, started, tmp_path / "run")
    assert "3-pruned: the disk is full; nothing was left half-written. Free some space" in message
    assert not (tmp_path / "run" / "3-pruned").exists()
    assert invoke(*started).exit_code == 0


@pytest.mark.parametrize("stop_after", ["text", "measure", "prune"])
def test_a_full_disk(invoke, whole_model, corpus, mount, monkeypatch, stop_after):
    disk = mount("size=3m")
    command = ["compress", str(whole_model), *small_flags(corpus, disk / "run")]
    before = STAGES[max(0, STAGES.index(stop_after) - 1)]
    if stop_after != "text":
        assert invoke(*command, "--stop-after", before).exit_code == 0
    kept = contents(disk / "run")
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 8192))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    result = invoke(*command, "--stop-after", stop_after)
    assert result.exit_code == 2
    assert "the disk is full" in only_message(result)
    (disk / "filler").unlink()
    assert contents(disk / "run").keys() == kept.keys()
    assert (disk / "run").exists() == bool(kept)
    assert invoke(*command, "--stop-after", stop_after).exit_code == 0


def test_a_disk_that_cannot_be_written(invoke, whole_model, corpus, mount):
    disk = mount("ro")
    result = invoke("compress", str(whole_model), *small_flags(corpus, disk / "run"))
    assert result.exit_code == 2
    assert f"{disk / 'run'}: Read-only file system. Check the path and its permissions" in only_message(result)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(whole_model, refused, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(whole_model)
    finally:
        tmp_path.chmod(0o700)


def test_permission_lost_during_a_stage(invoke, started, tmp_path, monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(weights, "write", denied)
    message = stopped(invoke, started, tmp_path / "run")
    assert "/some/file: Permission denied. Check the path and its permissions" in message


def test_the_run_folder_is_listed_in_one_place():
    """`contents` above would miss a stage whose file has another name than the run's table says."""
    assert list(OUTPUTS) == list(STAGES)
