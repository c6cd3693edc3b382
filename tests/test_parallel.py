"""Several ranks train as one does: the same loss curve, the same weights, from each other's checkpoints."""

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from conftest import add_tokenizer, small_flags, tiny_model, weights_of
from ranks import run
from torch.distributed.checkpoint import CheckpointException

import prunus as pr
from prunus import parallel
from prunus.documents import documents
from prunus.errors import BadOutput
from prunus.importance import score
from prunus.measure import measure
from prunus.prune import prune
from prunus.text import tokenise

SETTINGS = {"tokens": 1024, "batch_tokens": 128, "micro_blocks": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def setting(request, corpus, tmp_path_factory):
    """Folders of teacher, student and text: an untied head, and one tied to a scaled embedding."""
    folder = tmp_path_factory.mktemp("ranks")
    teacher = tiny_model(request.param, folder / "teacher")
    add_tokenizer(folder / "teacher")
    text = tokenise(documents(str(corpus)), teacher.tokenizer(), block_size=32, to=folder / "text", label="test")
    target = teacher.architecture.replace(layers=3, ffn=24)
    student = prune(teacher, score(measure(teacher, text.head(8))), target, to=folder / "student")
    return {"teacher": str(teacher.folder), "student": str(student.folder), "text": str(folder / "text")}


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["prunus.distill"])  # imported once, not by every rank


def trained(ranks: int, setting: dict[str, str], to: Path, *, fails: bool = False, **options: object) -> None:
    settings = SETTINGS | options.pop("settings", {})
    arguments = setting | {"to": str(to), "dtype": "float32", "settings": settings} | options
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=run, args=(rank, ranks, port, arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    assert None not in codes, "ranks wait for each other"
    assert any(codes) == fails


def curve(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "training.json").read_text())["curve"]


def assert_same(folder: Path, expected: Path) -> None:
    for key in ("loss", "norm"):
        assert [p[key] for p in curve(folder)] == pytest.approx([p[key] for p in curve(expected)], rel=1e-5)
    weights, wanted = (weights_of(pr.load(path)) for path in (folder, expected))
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(setting, tmp_path_factory):
    """What one undisturbed rank gives."""
    to = tmp_path_factory.mktemp("alone") / "student"
    trained(1, setting, to)
    return to


def test_two_ranks_are_one(setting, alone, tmp_path):
    trained(2, setting, tmp_path / "two")
    assert_same(tmp_path / "two", alone)
    assert not list(tmp_path.glob(".*"))


def test_one_rank_goes_on_with_two_and_two_with_one(setting, alone, tmp_path):
    to = tmp_path / "parts"
    trained(1, setting, to, stop_after=2, fails=True)
    trained(2, setting, to, stop_after=5, fails=True, background=True, checkpoint_seconds=0)
    assert not to.exists()
    trained(1, setting, to, background=True, checkpoint_seconds=0)
    assert_same(to, alone)


@pytest.mark.parametrize("setting", ["gemma3_text"], indirect=True)
def test_two_ranks_with_hidden_loss_cross_entropy_and_evaluation(setting, tmp_path):
    settings = {"hidden_loss": "mse", "hidden_layers": 2, "cross_entropy_share": 0.2, "evaluate_every": 4,
                "on_policy_share": 0.25}  # fmt: skip
    for ranks in (1, 2):
        trained(ranks, setting, tmp_path / str(ranks), settings=settings)
    assert_same(tmp_path / "2", tmp_path / "1")
    for key in ("hidden_loss", "heldout_loss"):
        one, two = ([point[key] for point in curve(tmp_path / ranks) if key in point] for ranks in "12")
        assert len(one) > 1
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("setting", ["llama"], indirect=True)
def test_two_ranks_in_bfloat16_stay_near_one(setting, tmp_path):
    for ranks in (1, 2):
        trained(ranks, setting, tmp_path / str(ranks), dtype="bfloat16")
    one, two = ([point["loss"] for point in curve(tmp_path / ranks)] for ranks in "12")
    assert two == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize("setting", ["llama"], indirect=True)
def test_two_ranks_whose_first_step_is_the_students_own_text(setting, tmp_path):
    for ranks in (1, 2):
        trained(ranks, setting, tmp_path / str(ranks), settings={"on_policy_share": 1.0, "tokens": 256})
    assert_same(tmp_path / "2", tmp_path / "1")


@pytest.mark.parametrize("setting", ["llava"], indirect=True)
@pytest.mark.parametrize("random_init", [False, True])
def test_two_ranks_beside_a_vision_tower(setting, tmp_path, random_init):
    """Which is not trained, but is as random as the rest where that is."""
    for ranks in (1, 2):
        trained(ranks, setting, tmp_path / str(ranks), random_init=random_init, settings={"tokens": 256})
    assert_same(tmp_path / "2", tmp_path / "1")


@pytest.mark.parametrize("setting", ["llama"], indirect=True)
def test_a_batch_that_ranks_cannot_share_is_refused(setting, tmp_path):
    trained(2, setting, tmp_path / "a", settings={"batch_tokens": 96}, fails=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_ranks_run_the_whole_pipeline_together(whole_model, corpus, invoke, tmp_path):
    """The first rank does alone what is not the training, a tournament too. One process finds everything done."""
    flags = [*small_flags(corpus, tmp_path / "run"), "--set", "search.tokens=512"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, "-m", "prunus", "compress", str(whole_model), *flags]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Distilled") == 1
    made = (tmp_path / "run" / "4-distilled" / "model.safetensors").stat().st_mtime_ns
    assert invoke("compress", str(whole_model), *flags).exit_code == 0
    assert (tmp_path / "run" / "4-distilled" / "model.safetensors").stat().st_mtime_ns == made
    assert (tmp_path / "run" / "report.html").is_file()
    assert pr.load(tmp_path / "run" / "4-distilled").parameters > 0
    # What the first rank refuses ends all of them.
    refused = subprocess.run([*command, "--params", "0.6x"], capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "was made with another recipe" in refused.stderr


def test_a_process_alone_is_a_world_of_one():
    assert parallel.world() == parallel.World(0, 1)
    assert parallel.share([1, 2, 3]) == [1, 2, 3]
    assert parallel.total({"a": 1.5}) == {"a": 1.5}
    assert parallel.together(True)
    assert not parallel.together(False)


@pytest.mark.parametrize("background", [False, True])
def test_states_follow_each_other_whole(tmp_path, background):
    folder = tmp_path / "state"
    assert not parallel.has_state(folder)
    saver, state = parallel.Saver(folder, background=background), torch.zeros(3)
    for number in range(3):
        saver.save({"a": state.fill_(number)}, {"step": number})
    state.fill_(9)  # what is trained on while the last is still being written
    saver.settle()
    (folder / ".partial").mkdir()  # of a process that was killed
    found = {"a": torch.zeros(3)}
    parallel.load_state(found, folder)
    assert parallel.load_record(folder) == {"step": 2}
    assert found["a"].tolist() == [2.0] * 3
    assert sorted(path.name for path in folder.iterdir()) == [".partial", "2"]


def test_a_damaged_state_is_named(tmp_path):
    folder = tmp_path / "state"
    parallel.Saver(folder, background=False).save({"a": torch.zeros(3)}, {})
    with pytest.raises(BadOutput, match="cannot be read"):
        parallel.load_state({"a": torch.zeros(5)}, folder)
    (file,) = folder.glob("*/*.safetensors")
    file.write_bytes(b"")
    with pytest.raises(BadOutput, match="cannot be read"):
        parallel.load_state({"a": torch.zeros(3)}, folder)


def test_a_failure_in_the_background_is_not_lost(tmp_path):
    folder = tmp_path / "state"
    saver = parallel.Saver(folder, background=True)
    saver.save({"a": torch.zeros(3)}, {})
    saver.settle()
    saver.save({"a": torch.zeros(3)}, {"step": 1})
    saver.pending.result()
    saver.pending = Future()
    full = OSError(errno.ENOSPC, "No space left on device")
    saver.pending.set_exception(CheckpointException("", {0: (full, traceback.StackSummary())}))
    with pytest.raises(BadOutput, match="space"):
        saver.settle()
    assert parallel.load_record(folder) == {}
