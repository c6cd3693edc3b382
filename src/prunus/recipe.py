"""One YAML → frozen typed values. Unknown keys are refused with a suggestion, and all mistakes come at once."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunus import depth, importance
from prunus.budget import CONTEXT, LIMITS
from prunus.errors import BadRecipe
from prunus.fields import Amount, Amounts, Block, Count, Location, Time, expanded, name_of
from prunus.losses import DIVERGENCES, HIDDEN_LOSSES
from prunus.mistakes import explained
from prunus.repair import DAMPING
from prunus.schedule import SCHEDULES, Settings
from prunus.teacher import KINDS

STAGES = ("text", "measure", "score", "search", "prune", "distill", "evaluate", "report")
Stage = Literal["text", "measure", "score", "search", "prune", "distill", "evaluate", "report"]

Parsed = TypeVar("Parsed", bound=BaseModel)


class Section(BaseModel):
    """Part of a recipe. Frozen; unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Section):
    """One part of a mixture."""

    source: str = Field(description="file, folder or hub id")
    weight: float = Field(1.0, gt=0, description="share of the text, relative to the other sources")
    text_field: str | None = Field(None, description="column that holds the text")


class Data(Section):
    """Text. Held-out text decides between candidates and judges the result; it is never trained on."""

    train: str | list[Source] = Field(
        description="training text: a file, folder (JSONL, Parquet, text) or hub id, or a list of them with weights"
    )
    heldout: str | None = Field(None, description="held-out text; default: a share of the documents of `train`")
    heldout_share: float = Field(0.05, gt=0, lt=1, description="share held out where `heldout` is not given")
    heldout_tokens: Count = Field(65536, description="held-out tokens; a third is for the search, the rest judges")
    text_field: str | None = Field(None, description="column that holds the text; default: `text`")
    block_size: Block = Field(512, description="tokens of a packed block: the context in training and evaluation")

    @property
    def sources(self) -> list[Source]:
        """The training text as a mixture, of one or several."""
        parts = [Source(source=self.train)] if isinstance(self.train, str) else self.train
        return [part.model_copy(update={"text_field": part.text_field or self.text_field}) for part in parts]

    @model_validator(mode="after")
    def _apart(self) -> Data:
        if self.heldout is not None:
            judge = _resolved(self.heldout)
            for part in self.sources:
                trained = _resolved(part.source)
                if judge.is_relative_to(trained) or trained.is_relative_to(judge):
                    raise ValueError(
                        f"heldout: {self.heldout} is trained on too, as {part.source}; "
                        "leave heldout away to hold out a share of the training text"
                    )
        return self

    @property
    def label(self) -> str:
        """Its name, for reports."""
        return " + ".join(part.source for part in self.sources)


def _resolved(source: str) -> Path:
    return Path(expanded(source)).resolve()


class LocalTask(Section):
    """A multiple-choice task over a local JSONL file. See `prunus.tasks.LocalTask`."""

    name: str
    file: str
    query: str = ""
    choices: str | list[str]
    gold: str | int


class Measure(Section):
    """The pass over calibration text."""

    tokens: Count = Field(32768, description="calibration tokens, from the training text")
    gradients: bool = Field(
        True, description="also gradients of a part of the text, by which fisher scores weigh errors"
    )
    leave_one_out: bool = Field(False, description="also the loss without each layer (layers=leave_one_out)")
    iterative: bool = Field(
        False, description="also layer after layer leaving, each time the least missed one (layers=iterative)"
    )
    contiguous: bool = Field(False, description="also a run of neighbours leaving, as it grows (layers=contiguous)")
    contiguous_by_task: str | LocalTask | None = Field(
        None, description="the same by a task of lm-eval, or a local one (layers=contiguous_by_task)"
    )
    task_rows: Count = Field(200, description="rows of that task")
    logit_mse: bool = Field(False, description="also the change of the logits without each layer (layers=logit_mse)")


def _one_of(axis: str) -> Any:
    return name_of(importance.AGGREGATIONS if axis == "aggregation" else tuple(importance.TABLE[axis]))


class Score(Section):
    """Which published score ranks each axis, and the aggregation "over blocks : over tokens"."""

    layers: _one_of("layers") = importance.DEFAULTS["layers"]  # type: ignore[valid-type]
    hidden: _one_of("hidden") = importance.DEFAULTS["hidden"]  # type: ignore[valid-type]
    ffn: _one_of("ffn") = importance.DEFAULTS["ffn"]  # type: ignore[valid-type]
    heads: _one_of("heads") = importance.DEFAULTS["heads"]  # type: ignore[valid-type]
    kv_heads: _one_of("kv_heads") = importance.DEFAULTS["kv_heads"]  # type: ignore[valid-type]
    experts: _one_of("experts") = importance.DEFAULTS["experts"]  # type: ignore[valid-type]
    expert_ffn: _one_of("expert_ffn") = importance.DEFAULTS["expert_ffn"]  # type: ignore[valid-type]
    shared_ffn: _one_of("shared_ffn") = importance.DEFAULTS["shared_ffn"]  # type: ignore[valid-type]
    linear_heads: _one_of("linear_heads") = importance.DEFAULTS["linear_heads"]  # type: ignore[valid-type]
    mamba_heads: _one_of("mamba_heads") = importance.DEFAULTS["mamba_heads"]  # type: ignore[valid-type]
    mamba_head_dim: _one_of("mamba_head_dim") = importance.DEFAULTS["mamba_head_dim"]  # type: ignore[valid-type]
    state: _one_of("state") = importance.DEFAULTS["state"]  # type: ignore[valid-type]
    q_rank: _one_of("q_rank") = importance.DEFAULTS["q_rank"]  # type: ignore[valid-type]
    kv_rank: _one_of("kv_rank") = importance.DEFAULTS["kv_rank"]  # type: ignore[valid-type]
    aggregation: _one_of("aggregation") = importance.DEFAULTS["aggregation"]  # type: ignore[valid-type]


class Search(Section):
    """How the architecture is found; unused with an explicit `arch`."""

    candidates: int = Field(4, ge=1, description="architectures that are built, repaired and measured")
    probe_tokens: Count = Field(4096, description="calibration tokens for the repair of each probe and candidate")
    tokens: Count | None = Field(
        None, description="training tokens of the finalists, where candidates are trained a little before one is chosen"
    )
    workers: int = Field(1, ge=1, description="candidates that are trained side by side, on Ray (prunus[ray])")
    tolerance: float = Field(0.01, gt=0, le=0.2, description="allowed distance from the budget, as a share of it")
    portable: bool = Field(True, description="only shapes that llama.cpp and vLLM load too, not transformers alone")

    def space(self) -> dict[str, Any]:
        """Arguments of `prunus.space.legal_architectures`."""
        return {"tolerance": self.tolerance, "portable": self.portable}


class Prune(Section):
    """The cut."""

    repair: bool = Field(True, description="least-squares repair")
    tokens: Count = Field(131072, description="tokens of the training text for the repair, calibration text included")
    norm_correction: bool = True
    head_residuals: bool = False
    damping: float = Field(DAMPING, gt=0, description="ridge of the repair, as a share of the mean diagonal")

    def manner(self) -> dict[str, Any]:
        """Arguments of `prunus.prune.prune`."""
        return {
            "norm_correction": self.norm_correction,
            "head_residuals": self.head_residuals,
            "damping": self.damping,
        }


class Distill(Section):
    """The training. See `prunus.schedule.Settings`."""

    tokens: Count | None = Field(None, description="training tokens; default: the text once")
    batch_tokens: Count | None = Field(None, description="tokens of a step; default: at least 256 steps")
    micro_blocks: Count | None = Field(None, description="blocks that go through the model at once; default: what fits")
    learning_rate: float | None = Field(
        None, gt=0, description="peak; default: 2.5e-4 · √(576 / hidden) · √(KL at the start), less of small weights"
    )
    schedule: name_of(SCHEDULES) = "cosine"  # type: ignore[valid-type]
    final_share: float = Field(0.1, ge=0, le=1)
    warmup_share: float = Field(0.05, ge=0, le=1)
    decay_share: float = Field(0.2, ge=0, le=1, description="of schedule=wsd: share of the steps in which it falls")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    divergence: name_of(DIVERGENCES) = "forward_kl"  # type: ignore[valid-type]
    temperature: float = Field(1.0, gt=0)
    mix: float = Field(0.5, gt=0, lt=1, description="β of jsd, α of skewed_kl and skewed_reverse_kl")
    cross_entropy_share: float = Field(0.0, ge=0, le=1, description="share of the text's own next token in the loss")
    hidden_loss: name_of(HIDDEN_LOSSES) | None = Field(  # type: ignore[valid-type]
        None, description="also compare hidden states; worth it where depth was cut"
    )
    hidden_weight: float = Field(1.0, gt=0, description="of it; at 1 it is as large as the divergence")
    hidden_layers: Count = Field(4, description="how many layers it compares")
    on_policy_share: float = Field(
        0.0, ge=0, le=1, description="of the steps, in which the student continues the text itself; slow"
    )
    evaluate_every: int = Field(0, ge=0, description="steps between measurements of the held-out loss; 0: never")
    patience: int = Field(0, ge=0, description="measurements without gain before training ends early; 0: never")
    seed: int = Field(0, ge=0, lt=2**63)
    teacher_cache: name_of(KINDS) | None = Field(  # type: ignore[valid-type]
        None, description="run the teacher once and keep what the loss needs; pays from the second epoch or student on"
    )
    cache_per_token: Count = Field(12, description="ids that a cache of samples or top_k keeps of each token")
    gradient_checkpointing: bool = Field(False, description="a quarter more work for far less memory")
    compile: bool = Field(False, description="pass the layers of both models through torch.compile")
    trackers: list[name_of(("tensorboard", "wandb", "trackio"))] = []  # type: ignore[valid-type]
    checkpoint_seconds: float = Field(120.0, ge=0, description="between checkpoints: what a killed run loses at most")

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        short = self.teacher_cache not in (None, "hidden")
        mistakes = {
            "on_policy_share: a cache knows nothing of text that is yet to be written": self.on_policy_share,
            "hidden_loss: a cache has nothing of the layers between": self.hidden_loss,
            f"divergence: {self.teacher_cache} give forward_kl only": short and self.divergence != "forward_kl",
        }
        if self.teacher_cache and (found := [mistake for mistake, made in mistakes.items() if made]):
            raise ValueError(f"{found[0]}; drop teacher_cache")
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments of `prunus.schedule.Settings`: all that the weights depend on, but for the teacher's cache."""
        names = {field.name for field in dataclasses.fields(Settings)}
        return {name: value for name, value in self.model_dump().items() if name in names}


class Evaluate(Section):
    """What is measured at the end."""

    tasks: list[str | LocalTask] = Field(default_factory=list, description="lm-eval tasks, or local JSONL tasks")
    limit: Count | None = Field(None, description="rows of each task; default: all")
    speed: bool = True
    prompts: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, description="prompts of the sample texts; default: a few neutral ones"
    )


class Recipe(Section):
    """Everything that a run depends on."""

    model: Location = Field(description="folder, hub id or .gguf file")
    to: Location = Field(description="run directory")
    start: Location | None = Field(
        None, description="an earlier student of `model`, which is cut instead of it; `model` teaches"
    )
    params: Amounts | None = Field(None, description="budget of parameters: 0.7x or 95M; several: 0.75x,0.5x")
    memory: Amount | None = Field(None, description="budget of weights + KV cache: 0.7x or 180MB")
    weights: Amount | None = Field(None, description="budget of bytes of the weights: 0.7x or 180MB")
    kv_cache: Amount | None = Field(None, description="budget of bytes of the KV cache: 0.5x or 40MB")
    flops: Amount | None = Field(None, description="budget of FLOPs per token: 0.6x or 200M")
    latency: Time | None = Field(None, description="budget of time per generated token on this machine: 0.6x or 40ms")
    context: Count = Field(CONTEXT, description="tokens of the KV cache that a budget counts")
    arch: str | None = Field(None, description="explicit sizes: hidden=512,ffn=1024,…")
    rounds: bool = Field(
        True, description="cut more than a third of the parameters in rounds, with distillation between"
    )
    uneven: bool = Field(False, description="layers may lose their attention alone; `layers` counts branches then")
    data: Data
    measure: Measure = Measure()
    score: Score = Score()
    search: Search = Search()
    prune: Prune = Prune()
    distill: Distill = Distill()
    baseline: bool = Field(False, description="also train the same architecture from random weights")
    evaluate: Evaluate = Evaluate()
    stop_after: Stage = "report"

    @property
    def sizes(self) -> list[str]:
        """The budgets of parameters, where there are several."""
        return [size.strip() for size in (self.params or "").split(",")]

    @property
    def limits(self) -> dict[str, Any]:
        """What `budget.parse_budget` is given."""
        return {kind: getattr(self, kind) for kind in LIMITS} | {"context": self.context}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        mistake = _budget_mistake(vars(self))
        if mistake is None and len(self.sizes) > 1 and len(given := _given(vars(self))) > 1:
            mistake = f"params gives several sizes, which {' and '.join(given[1:])} cannot be combined with"
        if mistake is None and self.search.workers > 1 and not self.search.tokens:
            mistake = "search.workers: nothing is trained side by side without search.tokens"
        for score, wanted in {**dict.fromkeys(depth.KINDS, "true"), "contiguous_by_task": "the name of a task"}.items():
            if mistake is None and self.score.layers == score and not getattr(self.measure, score):
                mistake = f"score.layers: {score} needs measure.{score}: {wanted}, or choose another score"
        if mistake is not None:
            raise ValueError(mistake)
        return self


def _budget_mistake(values: Mapping[str, Any]) -> str | None:
    given = _given(values)
    if values.get("arch") is not None:
        return f"arch says all sizes, so there is nothing left for {' and '.join(given)} to decide" if given else None
    return None if given else f"a budget is needed: one or several of {', '.join(LIMITS)}; or arch"


def _given(values: Mapping[str, Any]) -> list[str]:
    return [name for name in LIMITS if values.get(name) is not None]


def parse(values: Mapping[str, Any], *, source: str) -> Recipe:
    """A recipe from plain data. Raises BadRecipe, see `parse_section`."""
    return parse_section(Recipe, values, source=source)


def parse_section(section: type[Parsed], values: Mapping[str, Any], *, source: str) -> Parsed:
    """A recipe, or one section of it, from plain data.

    Raises:
        BadRecipe: lists every mistake, unknown keys with the nearest known one.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        mistakes = explained(error, section)
        # pydantic looks at the whole only when its parts are right; the user should hear of both at once.
        if section is Recipe and (budget := _budget_mistake(values)) and budget not in mistakes:
            mistakes.append(budget)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise BadRecipe(f"{source}: {count}\n" + "\n".join(f"  - {mistake}" for mistake in mistakes)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BadRecipe if it is none."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise BadRecipe(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadRecipe(f"{file}: a recipe is a mapping of keys to values (see recipes/ for examples)")
    return values


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some replaced, given by dotted path."""
    result = copy.deepcopy(dict(values))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            if not isinstance(place.setdefault(parent, {}), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return result
