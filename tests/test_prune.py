"""mask = cut, keep all = same bits, and what the repairs promise; for every family and axis."""

import copy
import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GRANITE, KINDS, VARIANTS, builder, for_each_kind, seen, tiny_model, weights_of
from torch import Tensor
from torch.overrides import TorchFunctionMode

import prunus as pr
from prunus import cost, dims, hardware, packing, weights
from prunus.anatomy import layers_of
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint, save
from prunus.errors import BadCheckpoint, BudgetUnreachable
from prunus.families import Family, family_of, known_families
from prunus.importance import score
from prunus.layerwise import branches_of
from prunus.measure import measure
from prunus.prune import KEPT_FILE, build, cut, prune, repaired
from prunus.scores import Scores
from prunus.selection import Kept, illegal_cut, ranked_layers, select
from prunus.source import in_memory, on_disk, opened

CUTS = {
    "layers": {"layers": 3},
    "hidden": {"hidden": 36},
    "ffn": {"ffn": 24},
    "heads": {"heads": 3},
    "kv_heads": {"heads": 4, "kv_heads": 2},
    "width": {"hidden": 32, "heads": 4, "kv_heads": 2},
    "experts": {"experts": 4},
    "top_k": {"top_k": 1},
    "expert_ffn": {"expert_ffn": 16},
    "shared_ffn": {"shared_ffn": 16},
    "mamba_heads": {"mamba_heads": 6},
    "mamba_head_dim": {"mamba_head_dim": 4},
    "state": {"state": 5},
    "latents": {"q_rank": 14, "kv_rank": 10},
    "all": {"layers": 3, "hidden": 36, "ffn": 24, "heads": 2, "kv_heads": 2},
    "all and experts": {"layers": 3, "hidden": 40, "experts": 4, "expert_ffn": 16, "heads": 2, "kv_heads": 2},
}


def _own_cuts(family: Family, axis: str) -> dict[str, int]:
    """Of the sizes in `CUTS` those that the family has, if all of its own kind are there."""
    own = family.fields.keys() - family.derived.keys()
    return {name: size for name, size in CUTS[axis].items() if name in own}


CASES = [
    (name, axis)
    for name, family in ((name, family_of(name)) for name in KINDS)
    for axis in CUTS
    if CUTS[axis].keys() - {"ffn"} <= family.fields.keys() and _own_cuts(family, axis)
]
"""Each kind of layers with the cuts that it knows. The others are cut by draws, the first of them in every axis."""
for_each_axis = pytest.mark.parametrize(("family_name", "axis"), CASES, indirect=["family_name"], scope="session")
REPAIRED = ("ffn", "heads", "layers", "experts", "expert_ffn", "all", "all and experts")


def legal(teacher: Checkpoint, axis: str) -> Architecture:
    target = teacher.architecture.replace(**_own_cuts(teacher.family, axis))
    if target == teacher.architecture:
        pytest.skip(f"{teacher.family.model_type}: this variant has no such axis of its own")
    if reasons := illegal_cut(teacher.family, teacher.architecture, target):
        pytest.skip(f"{teacher.family.model_type}: {reasons[0]}")
    return target


def read(model: torch.nn.Module, blocks: "object") -> Tensor:
    """Logits of two blocks of text, one behind the other."""
    tokens, positions = blocks.batch([0, 1])
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float().flatten(0, 1)


def logits(model: torch.nn.Module, blocks: "object") -> Tensor:
    """The same, and behind them those of an image where the model sees."""
    image = seen(model.config)
    with torch.no_grad():
        looked = [model(**image, use_cache=False).logits.float()[0]] if image else []
    return torch.cat([read(model, blocks), *looked])


def masked(teacher: Checkpoint, kept: Kept, target: Architecture) -> Checkpoint:
    """The teacher at full size, with everything that is not kept set to zero in every weight, and dropped experts out
    of reach of the router."""
    tensors = {}
    for name, tensor in weights_of(teacher).items():
        layer, _ = teacher.family.split(name)
        if layer is not None and layer not in kept.layers:
            tensors[name] = torch.zeros_like(tensor)
            continue
        number = 0 if layer is None else kept.layers.index(layer)
        stays = torch.ones_like(tensor)
        for dim, formula in enumerate(teacher.layout[name]):
            index = kept.index(formula, number, teacher.architecture)
            if index is not None and index.ndim == 1:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill_(0, index, False)
                stays.index_fill_(dim, gone.nonzero().flatten(), 0)
            elif index is not None:  # of each expert its own
                for expert, row in zip(kept.inner["experts"][number], index, strict=True):
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill_(0, row, False)
                    stays[expert].index_fill_(dim - 1, gone.nonzero().flatten(), 0)
        tensors[name] = tensor * stays
        if "e_score_correction_bias" in name:
            tensors[name] += UNREACHABLE * (1 - stays)
        if teacher.family.centred:
            _centre(tensors[name], teacher, name, torch.tensor(kept.hidden))
    config, sizes = copy.deepcopy(teacher.config), teacher.architecture
    if "top_k" in target:
        setattr(teacher.family.text(config), teacher.family.fields["top_k"], target.top_k)
        sizes = sizes.replace(top_k=target.top_k)
    same = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(teacher)}
    same |= {
        "config": config,
        "architecture": sizes,
        "stored": {name: InMemory(tensor) for name, tensor in tensors.items()},
    }
    return MaskedTeacher(**same, routers=kept.inner.get("experts", []), layers=kept.layers)


UNREACHABLE = -1e4


@dataclasses.dataclass(frozen=True)
class InMemory:
    """In place of `storage.Stored`."""

    tensor: Tensor
    places: tuple[()] = ()

    def parts(self) -> weights.Parts:
        return weights.of(self.tensor)


@dataclasses.dataclass(frozen=True)
class MaskedTeacher(Checkpoint):
    """In memory alone; its routers never choose a dropped expert.

    Attributes:
        routers: of each kept layer the experts that stay.
    """

    routers: list[list[int]] = dataclasses.field(default_factory=list)
    layers: list[int] = dataclasses.field(default_factory=list)

    def module(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> torch.nn.Module:
        model = self.skeleton(dtype)
        model.load_state_dict({name: stored.tensor for name, stored in self.stored.items()}, strict=False, assign=True)
        model.tie_weights()
        model = hardware.place(model, device=device)
        for number, experts in zip(self.layers, self.routers, strict=False):
            layer = layers_of(model)[number]
            for branch in branches_of(layer, self.family):
                if branch.experts:
                    name = next(read for read in branch.reads if self.family.outputs(read) == "experts")
                    _mask(layer.get_submodule(name), experts, self.architecture.experts)
        return model


def _mask(router: torch.nn.Module, experts: list[int], count: int) -> None:
    forward, gone = router.forward, [expert for expert in range(count) if expert not in experts]

    class Unreachable(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            return found.index_fill(-1, torch.tensor(gone), UNREACHABLE) if function is F.linear else found

    def masked_forward(*args: object) -> object:
        with Unreachable():
            return forward(*args)

    if gone:
        router.forward = masked_forward


def _centre(tensor: Tensor, teacher: Checkpoint, name: str, hidden: Tensor) -> None:
    """What is written to the stream with a mean of zero over the kept channels: a LayerNorm then sees nothing of the
    dropped ones, as an RMSNorm sees nothing of zeros."""
    local = teacher.family.split(name)[1].rsplit(".", 1)[0]
    outer = {name.removesuffix(".weight") for name in teacher.family.outer_weights} - {teacher.family.head}
    writes = {branch.write for branch in teacher.family.branches} | outer - {teacher.family.final_norm}
    for dim, formula in enumerate(teacher.layout[name]):
        if local in writes and formula == "hidden":
            kept = tensor.index_select(dim, hidden)
            tensor.index_copy_(dim, hidden, kept - kept.mean(dim, keepdim=True))


_SCORES: dict[Path, Scores] = {}


def scored(teacher: Checkpoint, blocks: "object") -> Scores:
    """Measured once for all cuts of a teacher."""
    if teacher.folder not in _SCORES:
        _SCORES[teacher.folder] = score(measure(teacher, blocks))
    return _SCORES[teacher.folder]


def cut_and_reload(teacher: Checkpoint, target: Architecture, blocks: "object", folder: Path) -> torch.nn.Module:
    """The student as transformers loads it, after it was seen to compute what the masked teacher computes."""
    scores = scored(teacher, blocks)
    kept = select(scores, teacher.architecture, target)
    masked_teacher = masked(teacher, kept, target)
    # The masked model is measured itself: its dropped channels hold no energy, which the norm correction must see.
    model = masked_teacher.module()
    found = measure(masked_teacher, blocks, source=in_memory(model), gradients=False)
    scores = dataclasses.replace(
        scores, energies={norm: energy / found.num_tokens for norm, energy in found.energies.items()}
    )
    student = prune(masked_teacher, scores, target, to=folder / "student")
    reloaded = builder(teacher.config.model_type).from_pretrained(folder / "student", dtype=torch.float32)
    if teacher.family.ignores_positions:
        packing.separate(reloaded)
    expected, actual = logits(model, blocks), logits(reloaded, blocks)
    assert json.loads((folder / "student" / KEPT_FILE).read_text())["kept"] == vars(kept)
    assert (actual - expected).norm() / expected.norm() < 1e-4
    if target.hidden < teacher.architecture.hidden:  # what slicing alone does to the norms is no rounding error
        sliced = logits(build(cut(masked_teacher, scores, target, norm_correction=False), torch.float32), blocks)
        assert (sliced - expected).norm() / expected.norm() > 1e-2
    config = json.loads((folder / "student" / "config.json").read_text())
    assert config["architectures"] == [type(reloaded).__name__]  # by which runtimes choose their code
    counted = sum(parameter.numel() for parameter in reloaded.parameters())
    planned = cost.parameters(teacher.family, teacher.layout, target, ranked_layers(scores, teacher.architecture))
    assert student.parameters == counted == planned
    return reloaded.eval()


@for_each_axis
def test_masked_teacher_equals_saved_and_reloaded_student(teacher, blocks, axis, tmp_path):
    cut_and_reload(teacher, legal(teacher, axis), blocks, tmp_path)


def test_beside_an_embedding_scaled_by_its_width_biases_shrink_too(blocks, tmp_path):
    teacher = tiny_model("gemma", tmp_path / "teacher", attention_bias=True)
    cut_and_reload(teacher, teacher.architecture.replace(hidden=36), blocks, tmp_path)


def assert_cache_changes_nothing(model: torch.nn.Module, blocks: "object") -> None:
    prompt = blocks.batch([0])[0][:, :7]
    with_cache, without = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def draws(family: str) -> range:
    return range(3 if family in KINDS else 2)


DRAWS = [(family, draw) for family in (*known_families(), *VARIANTS) for draw in draws(family)]


def test_there_are_two_hundred_draws():
    assert len(DRAWS) >= 200


@pytest.mark.parametrize(
    ("family_name", "draw"),
    [pytest.param(family, draw, marks=[pytest.mark.slow] if draw else []) for family, draw in DRAWS],
    indirect=["family_name"],
    scope="session",
)
def test_so_it_does_for_axes_drawn_at_random(teacher, blocks, draw, tmp_path):
    student = cut_and_reload(teacher, drawn(teacher, draw), blocks, tmp_path)
    for model in (student, *([teacher.module(torch.float32)] if draw == 0 else [])):
        assert_cache_changes_nothing(model, blocks)


def drawn(teacher: Checkpoint, draw: int) -> Architecture:
    """A legal architecture in which about every other axis is cut; in the first draw as many as can be at once."""
    if (teacher.folder, draw) not in _DRAWN:
        _DRAWN[teacher.folder, draw] = _drawn(teacher, draw)
    return _DRAWN[teacher.folder, draw]


_DRAWN: dict[tuple[Path, int], Architecture] = {}


def _drawn(teacher: Checkpoint, draw: int) -> Architecture:
    generator, sizes = random.Random(f"{teacher.family.model_type} {draw}"), teacher.architecture
    share, tries, best = (1.0, 30_000, sizes) if draw == 0 else (0.6, 10**9, sizes)

    free = [axis for axis in sizes.axes() if axis not in teacher.family.uncut]

    def size(axis: str) -> int:
        least = sizes[axis] // 4 if axis in ("hidden", "q_rank", "kv_rank") else 1  # what norms span
        return (
            generator.randint(least, max(least, sizes[axis] - (draw == 0)))
            if generator.random() < share
            else sizes[axis]
        )

    for _ in range(tries):
        target = sizes.replace(**{axis: size(axis) for axis in free})
        if target == sizes or illegal_cut(teacher.family, sizes, target):
            continue
        if draw or _cut_axes(target, sizes) == len(free):
            return target
        best = max(best, target, key=lambda found: _cut_axes(found, sizes))
    return best


def _cut_axes(target: Architecture, sizes: Architecture) -> int:
    return sum(target[axis] < sizes[axis] for axis in sizes.axes())


def test_the_draws_cut_every_axis(teacher, family_name):
    found = [drawn(teacher, draw) for draw in draws(family_name)]
    uncut = [axis for axis, size in teacher.architecture.axes().items() if all(draw[axis] == size for draw in found)]
    assert [axis for axis in uncut if teacher.architecture[axis] > 1 and axis not in teacher.family.uncut] == []


def test_keeping_everything_is_bitwise_equal(teacher, blocks, tmp_path):
    scores = scored(teacher, blocks)
    student = prune(teacher, scores, teacher.architecture, to=tmp_path / "student", calibration=blocks)
    assert student.stored.keys() == teacher.stored.keys()
    names = [weights.names(model.folder / "model.safetensors") for model in (student, teacher)]
    assert sorted(names[0]) == sorted(names[1])  # also in the files, which transformers wrote
    assert all(torch.equal(student.tensor(name), tensor) for name, tensor in weights_of(teacher).items())
    assert torch.equal(logits(student.module(), blocks), logits(teacher.module(), blocks))


@pytest.mark.parametrize(
    ("family_name", "axis"),
    [case for case in CASES if case[1] in REPAIRED],
    indirect=["family_name"],
    scope="session",
)
def test_repair_brings_the_student_nearer_to_its_teacher(teacher, blocks, axis):
    if axis == "layers" and teacher.family.branches[0].post_norm:
        pytest.skip("behind a sandwich norm the scale of a write is fixed, so it cannot stand in for a dropped layer")
    if axis == "layers" and teacher.family.branches[-1].write is None:
        pytest.skip("routed experts see some tokens each, so they cannot stand in for a dropped layer")
    target = legal(teacher, axis)
    student = cut(teacher, scored(teacher, blocks), target)
    expected = read(teacher.module(), blocks)
    before = (read(build(student, torch.float32), blocks) - expected).norm()
    after = (read(repaired(teacher, student, blocks), blocks) - expected).norm()
    assert after < before


@for_each_kind
def test_repair_is_the_same_with_a_teacher_from_the_disk(teacher, blocks):
    student = cut(teacher, scored(teacher, blocks), drawn(teacher, 0))
    whole, streamed = (repaired(teacher, student, blocks, source=source) for source in (None, on_disk(teacher)))
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ernie4_5_moe", {"use_bias": True}),
        ("nemotron_h", {"mlp_bias": True}),
        ("falcon_h1", {}),
        ("idefics3", {"model_type": "granite", **GRANITE}),
    ],
)
def test_repair_changes_nothing_where_nothing_was_lost(name, options, blocks, tmp_path):
    """A shared expert is fitted to what the routed ones leave, of which its own bias is no part; and factors that a
    module, or a decoder beside a vision tower, puts on what it writes are no part of a weight."""
    teacher = tiny_model(name, tmp_path, **options)
    student = cut(teacher, score(measure(teacher, blocks, gradients=False)), teacher.architecture)
    expected = read(teacher.module(), blocks)
    assert (read(repaired(teacher, student, blocks), blocks) - expected).norm() / expected.norm() < 1e-4


def test_repair_of_a_redundant_cut_is_exact(llama, blocks, tmp_path):
    """A neuron that repeats another can leave without loss: least squares gives its output to the one that stays."""
    model = llama.module(torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[30:] = projection.weight[:10]
    model.save_pretrained(tmp_path / "redundant")
    teacher = pr.load(tmp_path / "redundant")
    scores = score(measure(teacher, blocks))
    scores.axes["ffn"][:, :30] += 1e3
    student = cut(teacher, scores, teacher.architecture.replace(ffn=30))
    expected = logits(model, blocks)

    def error(candidate: torch.nn.Module) -> float:
        return float((logits(candidate, blocks) - expected).norm() / expected.norm())

    assert error(build(student, torch.float32)) > 0.1
    assert error(repaired(teacher, student, blocks, damping=1e-7)) < 1e-3


def test_a_short_type_that_the_machine_is_slow_in_is_left_for_float32(llama, blocks, tmp_path, monkeypatch):
    """Measured, searched and repaired in float32; what is written has the type of the teacher's files."""
    llama.module(torch.bfloat16).save_pretrained(tmp_path / "short")
    short, target = pr.load(tmp_path / "short"), llama.architecture.replace(ffn=20)
    monkeypatch.setattr(hardware, "compute_dtype", lambda: torch.float32)
    for source in (opened(short), on_disk(short)):
        assert {weight.dtype for layer in source.layers() for weight in layer.parameters()} == {torch.float32}
    scores = scored(short, blocks)
    assert repaired(short, cut(short, scores, target), blocks).dtype == torch.float32
    assert prune(short, scores, target, to=tmp_path / "student", calibration=blocks).dtype == torch.bfloat16
    monkeypatch.setattr(hardware, "compute_dtype", lambda: torch.bfloat16)
    assert [hardware.fast_dtype(each) for each in (torch.bfloat16, torch.float16, torch.float32)] == [
        torch.bfloat16,
        torch.float16 if torch.cuda.is_available() else torch.float32,
        torch.float32,
    ]


@for_each_kind
def test_head_residuals_change_only_the_queries(teacher, blocks):
    reads = next((branch.reads for branch in teacher.family.branches if branch.inner == "heads"), None)
    if reads is None:
        pytest.skip(f"{teacher.family.model_type} has no attention")
    target = legal(teacher, "heads")
    scores = score(measure(teacher, blocks))
    plain, folded = (
        {name: tensor.whole() for name, tensor in cut(teacher, scores, target, head_residuals=flag).tensors.items()}
        for flag in (False, True)
    )
    changed = {name.rsplit(".", 2)[1] for name in plain if not torch.equal(plain[name], folded[name])}
    assert changed == {reads[0].rsplit(".")[-1]}
    formula = teacher.family.layer_weights[f"{reads[0]}.weight"][0]
    queries = dims.owner(formula, target, "heads") >= 0
    name = next(name for name in plain if changed & set(name.split(".")) and name.endswith(".weight"))
    differs = (plain[name] != folded[name]).any(dim=1)
    assert differs.any()
    assert not differs[~queries].any()


def test_illegal_architecture_is_refused_with_the_reason(llama, blocks, tmp_path):
    scores = score(measure(llama, blocks))
    for sizes, reason in [
        ({"hidden": 40}, "multiple of heads"),
        ({"heads": 4}, "multiple of kv_heads"),
        ({"heads": 6, "kv_heads": 2}, "heads per group"),
        ({"ffn": 41}, "larger than the teacher"),
    ]:
        with pytest.raises(BudgetUnreachable, match=reason):
            prune(llama, scores, llama.architecture.replace(**sizes), to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_layers_whose_number_says_their_kind_leave_by_whole_periods():
    sizes = Architecture(layers=10, layer_period=4)
    order = ranked_layers(Scores({"layers": torch.tensor([5.0, 9, 1, 1, 1, 1, 9, 9, 2, 2])}, {}, {}), sizes)
    assert sorted(order[:6]) == [0, 1, 6, 7, 8, 9]  # the four of lowest score between them
    assert sorted(order[:2]) == [0, 1]
    for count in (6, 2):
        assert [layer % 4 for layer in sorted(order[:count])] == [place % 4 for place in range(count)]


def test_a_checkpoint_that_loads_otherwise_is_not_kept(llama, tmp_path):
    """Biases that the config does not announce: transformers would leave them out without a word."""
    sizes = llama.architecture
    biases = {
        f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(sizes.heads * sizes.head_dim)
        for layer in range(sizes.layers)
    }
    with pytest.raises(BadCheckpoint, match=r"q_proj\.bias, which is no part"):
        save(tmp_path / "out", llama.config, weights_of(llama) | biases, like=llama)
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_chooses_experts_keeps_its_bits_through_the_repair(blocks, tmp_path, monkeypatch):
    """It is stored in float32 beside bfloat16 weights, and differences that this rounds off choose."""
    teacher = tiny_model("deepseek_v3", tmp_path / "model")
    name = next(name for name in teacher.stored if name.endswith("e_score_correction_bias"))
    short = {key: value.bfloat16() for key, value in weights_of(teacher).items()}
    bias = 14.4 + torch.arange(6) / 1000
    mixed = save(tmp_path / "mixed", teacher.config, short | {name: bias}, like=teacher)
    monkeypatch.setattr(hardware, "compute_dtype", lambda: torch.bfloat16)
    scores, target = scored(mixed, blocks), mixed.architecture.replace(ffn=24)
    assert torch.equal(build(cut(mixed, scores, target), torch.bfloat16).state_dict()[name], bias)
    student = prune(mixed, scores, target, to=tmp_path / "student", calibration=blocks)
    assert torch.equal(student.tensor(name), bias)
    assert student.stored["lm_head.weight"].parts().dtype == torch.bfloat16
