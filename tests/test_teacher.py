"""Caches of a teacher: what they hold, that it is drawn from the teacher, and that a wrong one is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import add_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from test_distill import FAST, curve, setting, trained  # noqa: F401 — `setting` is a fixture

from prunus import losses
from prunus import teacher as teachers
from prunus.documents import documents
from prunus.errors import BadData, BadOutput
from prunus.evaluate import quality
from prunus.head import head_of
from prunus.kernels import Samples, TopK
from prunus.teacher import Live, describe, draw, open_cache, packed, unpacked, write_cache
from prunus.text import tokenise


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(teachers, "SHARD_BLOCKS", 8)


def cached(setting, to, progress=lambda done, total: None, **options):  # noqa: F811
    teacher, _, text = setting
    manifest = describe(teacher, text, **({"dtype": torch.float32} | options))
    return write_cache(teacher, text, manifest, to=to, progress=progress)


def probabilities(setting, indices, temperature=1.0):  # noqa: F811
    """float32 [B·S, V] of the live teacher."""
    teacher, _, text = setting
    model = teacher.module(torch.float32)
    dense = Live(model).targets(indices, *text.batch(indices))
    return (losses.head_logits(dense.hidden_NE, dense.head.weight_VD) / temperature).softmax(-1)


def test_ids_take_three_bytes():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 262143, 2**24 - 1]])
    assert packed(ids).nbytes == 3 * ids.size
    assert (unpacked(packed(ids)) == ids).all()


@pytest.mark.parametrize(("kind", "per_token"), [("samples", 12), ("top_k", 4), ("hidden", 7)])
def test_what_a_cache_takes_is_known_before(setting, tmp_path, kind, per_token):  # noqa: F811
    teacher, _, text = setting
    cached(setting, tmp_path / "cache", kind=kind, per_token=per_token)
    headers = 128 * len(list((tmp_path / "cache").glob("*.npy")))
    size = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.npy"))
    known = teachers.bytes_per_token(kind, per_token=per_token, hidden=teacher.architecture.hidden)
    assert size == known * text.num_tokens + headers
    assert kind != "samples" or known == 38


def test_samples_follow_the_distribution():
    p_RV = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    ids_RK = draw(p_RV, torch.rand(2, 40_000, dtype=torch.float64))
    counts = torch.stack([torch.bincount(ids, minlength=5) for ids in ids_RK])
    expected = p_RV * 40_000
    assert (counts[expected == 0] == 0).all()
    chi_squared = ((counts[0, :4] - expected[0, :4]) ** 2 / expected[0, :4]).sum()
    assert chi_squared < 16.3  # three degrees of freedom, 0.1 %
    edges = draw(p_RV, torch.tensor([[0.0, 1 - 2**-53], [0.0, 1 - 2**-53]], dtype=torch.float64))
    assert edges.tolist() == [[0, 3], [2, 2]]


def test_cached_samples_are_drawn_from_the_teacher(setting, tmp_path):  # noqa: F811
    """The mean log-probability of the samples is minus the teacher's entropy, within its standard error."""
    cache = cached(setting, tmp_path / "cache", per_token=64)
    indices = list(range(12))
    samples = cache.targets(indices, *setting[2].batch(indices))
    assert isinstance(samples, Samples)
    p = probabilities(setting, indices)
    drawn = p.gather(1, samples.ids_NK).log()
    entropy = torch.special.entr(p).sum(-1).mean().detach()
    spread = drawn.var(1).mean().sqrt() / drawn.numel() ** 0.5
    assert abs(drawn.mean() + entropy) < 4 * spread
    assert samples.entropy_N.float().mean() == pytest.approx(entropy.item(), rel=1e-3)


def test_the_rate_is_the_same_whatever_holds_the_teacher(setting, tmp_path):  # noqa: F811
    """It follows the divergence: the loss of samples is one too, in expectation, not the cross-entropy."""
    settings = dataclasses.replace(FAST, learning_rate=None)
    live = trained(setting, tmp_path / "live", settings=settings)
    cache = cached(setting, tmp_path / "cache", per_token=64)
    sampled = trained((cache, *setting[1:]), tmp_path / "sampled", settings=settings)
    assert np.mean(curve(sampled)) == pytest.approx(np.mean(curve(live)), rel=0.1)
    records = [json.loads((each.folder / "training.json").read_text())["curve"] for each in (live, sampled)]
    assert records[1][-1]["learning_rate"] == pytest.approx(records[0][-1]["learning_rate"], rel=0.05)


@pytest.mark.parametrize(("family", "options"), [("granite", {"logits_scaling": 8.0}), ("cohere2", {})])
def test_hidden_states_keep_the_factor_of_the_logits(family, options, corpus, tmp_path):
    teacher = tiny_model(family, tmp_path / "teacher", **options)
    add_tokenizer(tmp_path / "teacher")
    text = tokenise(documents(str(corpus)), teacher.tokenizer(), block_size=32, to=tmp_path / "text", label="test")
    some = text.head(2)
    wanted = describe(teacher, some, kind="hidden", dtype=torch.float32)
    cached_head = write_cache(teacher, some, wanted, to=tmp_path / "cache").targets([0], *some.batch([0])).head
    head = head_of(teacher.module(torch.float32))
    assert head.scale != 1
    assert cached_head.scale == head.scale
    old = shutil.copytree(tmp_path / "cache", tmp_path / "old")
    save_file({"weight": load_file(old / teachers.HEAD)["weight"]}, old / teachers.HEAD)  # as before it was kept
    with pytest.raises(BadData, match="left the factor on the logits out"):
        open_cache(old).targets([0], *some.batch([0]))


def test_top_k_holds_the_largest(setting, tmp_path):  # noqa: F811
    cache = cached(setting, tmp_path / "cache", kind="top_k", per_token=7, temperature=2.0)
    indices = [9, 2, 17]
    targets = cache.targets(indices, *setting[2].batch(indices))
    assert isinstance(targets, TopK)
    top = probabilities(setting, indices, temperature=2.0).topk(7)
    torch.testing.assert_close(targets.p_NK.float(), top.values, rtol=2e-3, atol=1e-6)
    assert (targets.ids_NK == top.indices).float().mean() > 0.99


def test_hidden_states_give_the_live_distribution(setting, tmp_path):  # noqa: F811
    teacher, _, text = setting
    cache = cached(setting, tmp_path / "cache", kind="hidden", dtype=torch.bfloat16)
    indices = [3, 11]
    dense = cache.targets(indices, *text.batch(indices))
    model = teacher.module(torch.bfloat16)
    live = Live(model).targets(indices, *text.batch(indices))
    assert torch.equal(dense.head.weight_VD, head_of(model).weight_VD)
    torch.testing.assert_close(dense.hidden_NE, live.hidden_NE, rtol=0.02, atol=0.02)


def test_a_killed_write_goes_on_and_ends_with_the_same_bytes(setting, tmp_path, monkeypatch):  # noqa: F811
    cached(setting, tmp_path / "whole")

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(setting, tmp_path / "parts", progress=stop)
    with pytest.raises(BadData, match="shards are missing"):
        open_cache(tmp_path / "parts")
    done = sorted(file.name for file in (tmp_path / "parts").iterdir())
    before = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in done}
    cached(setting, tmp_path / "parts")
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in done} == before
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_a_finished_cache_is_not_written_again(setting, tmp_path, monkeypatch):  # noqa: F811
    cached(setting, tmp_path / "cache")
    monkeypatch.setattr(teachers, "_write_shard", lambda *args: pytest.fail("written again"))
    cached(setting, tmp_path / "cache")


@pytest.mark.parametrize("field", ["teacher", "text", "tokenizer", "temperature", "dtype"])
def test_the_cache_of_something_else_is_refused(setting, tmp_path, field):  # noqa: F811
    cache = cached(setting, tmp_path / "cache")
    expected = dataclasses.asdict(cache.manifest) | {field: "another"}
    with pytest.raises(BadData, match=f"another {field}"):
        open_cache(cache.folder, **expected)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    (cache.folder / "manifest.json").write_text(json.dumps(manifest | {field: "another"}))
    with pytest.raises(BadOutput, match=f"another {field}"):
        cached(setting, tmp_path / "cache")


def test_a_damaged_shard_is_an_error(setting, tmp_path):  # noqa: F811
    cache = cached(setting, tmp_path / "cache")
    (cache.folder / "ids-00001.npy").write_bytes(b"half")
    with pytest.raises(BadData, match=r"ids-00001\.npy: cannot be read"):
        cache.targets([9], *setting[2].batch([9]))


def test_training_from_a_cache_of_hidden_states_is_training_live(setting, tmp_path):  # noqa: F811
    _, student, text = setting
    cache = cached(setting, tmp_path / "cache", kind="hidden", dtype=torch.bfloat16)
    live = trained(setting, tmp_path / "live", dtype=torch.bfloat16)
    from_cache = trained((cache, student, text), tmp_path / "cached", dtype=torch.bfloat16)
    assert curve(from_cache) == pytest.approx(curve(live), rel=0.02)


@pytest.mark.parametrize(("kind", "per_token"), [("samples", 64), ("top_k", 12)])
def test_training_from_a_sparse_cache_learns(setting, tmp_path, kind, per_token):  # noqa: F811
    teacher, student, text = setting
    cache = cached(setting, tmp_path / "cache", kind=kind, per_token=per_token)
    settings = dataclasses.replace(FAST, tokens=6400)
    after = trained((cache, student, text), tmp_path / "student", settings=settings)
    reference = teacher.module(torch.float32)
    kl = [quality(model.module(torch.float32), text, teacher=reference).kl_to_teacher for model in (student, after)]
    assert kl[1] < 0.7 * kl[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": 2.0}, "another temperature"), ({"divergence": "jsd"}, "forward_kl only")],
)
def test_a_cache_that_does_not_fit_the_training_is_refused(setting, tmp_path, change, message):  # noqa: F811
    _, student, text = setting
    cache = cached(setting, tmp_path / "cache")
    with pytest.raises(BadData, match=message):
        trained((cache, student, text), tmp_path / "student", settings=dataclasses.replace(FAST, **change))
    with pytest.raises(BadData, match="another text"):
        trained((cache, student, text.head(20)), tmp_path / "student")


def test_few_files_are_open_at_once(setting, tmp_path, monkeypatch):  # noqa: F811
    """A process may have about a thousand, and a cache of many tokens has more."""
    monkeypatch.setattr(teachers, "SHARD_BLOCKS", 1)
    cache, (_, _, text) = cached(setting, tmp_path / "cache"), setting
    assert len(text) > 2 * teachers.OPEN_FILES
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(len(text)):
        cache.targets([number], *text.batch([number]))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + teachers.OPEN_FILES


def test_of_all_ids_one_is_left_for_the_others(setting):  # noqa: F811
    teacher, _, text = setting
    assert describe(teacher, text, kind="top_k", per_token=10**6).per_token == teacher.architecture.vocab - 1
