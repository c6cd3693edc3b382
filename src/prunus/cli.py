"""One sub-command per stage: parse, call, print."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import yaml
from rich.markup import escape

from prunus import console
from prunus.errors import BadRecipe, PrunusError, Stopped

if TYPE_CHECKING:  # a command imports what it needs, so that --help is there at once
    from prunus.recipe import Recipe
    from prunus.run import Run

INTERRUPTED = 130

app = typer.Typer(
    name="prunus",
    help="Prune a pretrained language model and distil it back into a plain Hugging Face checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or .gguf file.")]
Source = Annotated[
    str, typer.Argument(metavar="MODEL|RECIPE|RUN", help="A model, a recipe.yaml, or the folder of an earlier run.")
]
Params = Annotated[str | None, typer.Option(help="Budget of parameters: 0.7x or 95M; several sizes: 0.75x,0.5x.")]
Memory = Annotated[str | None, typer.Option(help="Budget of weights + KV cache: 0.7x or 180MB.")]
Flops = Annotated[str | None, typer.Option(help="Budget of FLOPs per token: 0.6x or 200M.")]
Latency = Annotated[str | None, typer.Option(help="Budget of time per generated token, here: 0.6x or 40ms.")]
KVCache = Annotated[str | None, typer.Option(help="Budget of the KV cache alone: 0.5x or 40MB.")]
Context = Annotated[str | None, typer.Option(help="Tokens of the KV cache that a budget counts, such as 32k.")]
Arch = Annotated[str | None, typer.Option(help="Explicit sizes: hidden=512,ffn=1024,layers=24,heads=6,kv_heads=3.")]
Uneven = Annotated[
    bool | None,
    typer.Option("--uneven", help="Llama-like models: layers may lose attention alone (DeciLM); layers are branches."),
]
DataOption = Annotated[str | None, typer.Option(help="Text: JSONL, Parquet or text; a file, a folder, or a hub id.")]
Heldout = Annotated[str | None, typer.Option(help="Held-out text. Default: a share of the documents of --data.")]
Tokens = Annotated[str | None, typer.Option(help="Training tokens, such as 200k or 10M. Default: the text once.")]
To = Annotated[Path | None, typer.Option(help="Folder to write.")]
Baseline = Annotated[bool | None, typer.Option("--baseline", help="Also train the same shape from random weights.")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated. Local JSONL tasks: in a recipe.")]
StopAfter = Annotated[str | None, typer.Option(help="Last stage to run: text, measure, …, report.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other recipe key: --set distill.learning_rate=1e-4")]
Redo = Annotated[bool, typer.Option("--redo", help="Do stages again that a changed recipe makes stale.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _recipe(
    source: str, changes: dict[str, Any], settings: list[str] | None, defaults: dict[str, Any] | None = None
) -> Any:
    """The recipe of a file, a run folder, or flags alone; flags override it, and it overrides the defaults."""
    from prunus import recipe
    from prunus.budget import LIMITS
    from prunus.run import is_run

    path = Path(source)
    file = path / "recipe.yaml" if is_run(path) else path if path.suffix in (".yaml", ".yml") else None
    if file is not None and not file.is_file():
        raise BadRecipe(f"{file}: no such recipe")
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1  # else it may be a hub id
    if is_path and not os.path.exists(os.path.expanduser(source)):  # noqa: PTH110, PTH111 - ~name may be nobody's
        raise BadRecipe(f"{source}: no such file or folder: neither a run, a recipe nor a model. Check the path.")
    values = (defaults or {}) | ({"model": source} if file is None else recipe.read_yaml(file))
    values |= {"to": source} if is_run(path) else {}  # it may have been moved, or be a copy
    changes = {key: value for key, value in changes.items() if value is not None} | _settings(settings)
    budgets = (*LIMITS, "arch")
    # On the command line a budget replaces the recipe's, of whatever kind.
    if any(changes.get(key) is not None for key in budgets):
        values = {key: value for key, value in values.items() if key not in budgets}
    return recipe.parse(recipe.override(values, changes), source=str(file or "command line"))


def _settings(settings: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` options, the values read as YAML."""
    values = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise BadRecipe(f"--set {setting!r}: write KEY=VALUE, such as distill.learning_rate=1e-4")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # a ValueError of dates that are none
            raise BadRecipe(f"--set {setting!r}: the value is not YAML: {error}") from error
    return values


def _run(
    stage: str, source: str, changes: dict[str, Any], settings: list[str] | None, redo: bool, as_json: bool
) -> None:
    from prunus.pipeline import compress, report_again
    from prunus.run import is_run

    again = stage if is_run(Path(source)) and stage != "compress" else None
    if again == "report":
        recipe = _recipe(source, changes, settings)
        _show(report_again(recipe), recipe, as_json)
        return
    if stage != "compress":  # page and card say what was evaluated
        changes["stop_after"] = "report" if again == "evaluate" else stage
    elif is_run(Path(source)) and changes["stop_after"] is None:
        changes["stop_after"] = "report"  # the run may have been stopped earlier; now everything is asked for
    recipe = _recipe(source, changes, settings)
    run = compress(recipe, redo=redo or again is not None, redo_stage=again)
    if console.FIRST:
        _show(run, recipe, as_json)


def _show(run: Run, recipe: Recipe, as_json: bool) -> None:
    """What a command made, in the run that it ended with."""
    from prunus import summary
    from prunus.recipe import STAGES

    several = len(recipe.sizes) > 1
    if as_json:
        files = {name: str(run.path(name)) for name in STAGES if run.finished(name)}
        runs = {"runs": [str(run.root.with_name(size)) for size in recipe.sizes]} if several else {}
        typer.echo(json.dumps({"run": str(run.root), "files": files} | runs))
    elif several and recipe.stop_after == "report":
        summary.show_family(Path(recipe.to))
    else:
        summary.show(run)


def _stage_command(stage: str, help_text: str) -> None:
    """Registers a command that runs the pipeline up to `stage`; every one takes the same options."""

    def command(
        source: Source,
        params: Params = None,
        memory: Memory = None,
        flops: Flops = None,
        kv_cache: KVCache = None,
        latency: Latency = None,
        context: Context = None,
        arch: Arch = None,
        uneven: Uneven = None,
        data: DataOption = None,
        heldout: Heldout = None,
        tokens: Tokens = None,
        to: To = None,
        baseline: Baseline = None,
        tasks: Tasks = None,
        stop_after: StopAfter = None,
        settings: Set = None,
        redo: Redo = False,
        as_json: Json = False,
    ) -> None:
        changes = {
            "params": params,
            "memory": memory,
            "flops": flops,
            "kv_cache": kv_cache,
            "latency": latency,
            "context": context,
            "arch": arch,
            "uneven": uneven,
            "data.train": data,
            "data.heldout": heldout,
            "distill.tokens": tokens,
            "to": to and str(to),
            "baseline": baseline,
            "evaluate.tasks": tasks and tasks.split(","),
            "stop_after": stop_after,
        }
        _run(stage, source, changes, settings, redo=redo, as_json=as_json)

    app.command(stage, help=help_text)(command)


_stage_command("compress", "Do everything: **prunus compress MODEL --params 0.7x --data TEXT --to RUN**")


@app.command()
def inspect(model: Model, uneven: Uneven = None, as_json: Json = False) -> None:
    """Show the axes of a model, its sizes, and where its parameters sit."""
    from prunus import inspection
    from prunus.checkpoint import load

    checkpoint = load(model, uneven=bool(uneven))
    if as_json:
        typer.echo(json.dumps(inspection.facts(checkpoint)))
    else:
        inspection.show(checkpoint)


@app.command()
def plan(
    source: Source,
    params: Params = None,
    memory: Memory = None,
    flops: Flops = None,
    kv_cache: KVCache = None,
    context: Context = None,
    arch: Arch = None,
    uneven: Uneven = None,
    data: DataOption = None,
    tokens: Tokens = None,
    to: To = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for so many GPUs instead of for this machine.")] = None,
    tflops: Annotated[float, typer.Option(min=0.001, help="GEMM rate of each of them, in TFLOP/s.")] = 600,
    gigabytes: Annotated[float, typer.Option(min=0.0001, help="Memory of each of them.")] = 80,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Dry run: architecture, FLOPs, peak memory, time, and what would be written. Nothing is written."""
    from prunus import planning

    changes = {
        "params": params,
        "memory": memory,
        "flops": flops,
        "kv_cache": kv_cache,
        "context": context,
        "arch": arch,
        "uneven": uneven,
        "data.train": data,
        "distill.tokens": tokens,
        "to": to and str(to),
    }
    machine = None if gpus is None else planning.Machine(gpus, tflops * 1e12, int(gigabytes * 1e9))
    recipe = _recipe(source, changes, settings, {"to": "RUN"})  # nothing is written, so no folder need be named
    result = planning.plan(recipe, machine)
    typer.echo(json.dumps(result)) if as_json else planning.show(result)


_stage_command("measure", "Measure the teacher on calibration text.")
_stage_command("score", "Score every layer, channel, neuron, head and group.")
_stage_command("search", "Find the architecture for a budget.")
_stage_command("prune", "Cut and repair; writes 3-pruned/.")


@app.command()
def vocabulary(
    model: Model,
    size: Annotated[str, typer.Option(help="Tokens to keep, such as 32k (32,000) or 32768.")],
    data: Annotated[str, typer.Option(help="Text whose tokens are kept: JSONL, Parquet or text, or a hub id.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    documents: Annotated[int, typer.Option(min=1, help="Documents of the text to count.")] = 100_000,
    tokens: Annotated[
        str | None, typer.Option(help="Train on so many tokens of the text afterwards, such as 200k. Default: none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Cut the vocabulary to the tokens that a text needs. Any text can still be written and read.

    What is cut off is spelled by smaller tokens, which the model is not used to; **--tokens 200k** teaches it.
    """
    from prunus import standalone

    result = standalone.trim_vocabulary(model, data, size=size, most_documents=documents, tokens=tokens, to=to)
    typer.echo(json.dumps(result)) if as_json else standalone.show_vocabulary(result)


@app.command()
def distill(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT|RECIPE|RUN", help="A model to train, a recipe.yaml, or a run's folder.")
    ],
    teacher: Annotated[str | None, typer.Option(help="The model to learn from; not needed for a run.")] = None,
    data: DataOption = None,
    heldout: Heldout = None,
    tokens: Tokens = None,
    to: To = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Distil any model into another of the same vocabulary; or a recipe up to this stage, or this stage of a run again.

    On several GPUs: **torchrun --nproc-per-node 8 -m prunus distill recipe.yaml**
    """
    from prunus import standalone
    from prunus.run import is_run

    if is_run(Path(student)) or Path(student).suffix in (".yaml", ".yml"):
        if teacher is not None:
            raise BadRecipe(f"--teacher: {student} names its own; --set model={teacher} makes another run of it")
        changes = {"data.train": data, "data.heldout": heldout, "distill.tokens": tokens, "to": to and str(to)}
        _run("distill", student, changes, settings, redo=is_run(Path(student)), as_json=as_json)
        return
    missing = [name for name, value in (("--teacher", teacher), ("--data", data), ("--to", to)) if value is None]
    if missing:
        raise BadRecipe(f"distill needs {', '.join(missing)}")
    values = {key.removeprefix("distill."): value for key, value in _settings(settings).items()}
    written = standalone.distill(
        student, str(teacher), str(data), heldout=heldout, tokens=tokens, settings=values, to=Path(str(to))
    )
    if not console.FIRST:
        return
    typer.echo(json.dumps({"student": str(written)}) if as_json else f"Wrote {written}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A model, or the folder of a run.")],
    teacher: Annotated[str | None, typer.Option(help="Also KL and agreement with this model.")] = None,
    data: DataOption = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens of text to measure on. Default: 64k.")] = None,
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task. Default: all.")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Perplexity, divergence from a teacher, lm-eval tasks and speed of any model; or that stage of a run again."""
    from prunus import standalone
    from prunus.run import is_run

    chosen = tasks.split(",") if tasks else []
    if is_run(Path(model)):
        given = {"--teacher": teacher, "--data": data, "--tokens": tokens}
        if unused := [name for name, value in given.items() if value is not None]:
            raise BadRecipe(
                f"{', '.join(unused)}: a run is measured on its own held-out text and against its own teacher; "
                f"for others: prunus evaluate {model}/4-distilled …"
            )
        changes = {"evaluate.tasks": chosen or None, "evaluate.limit": limit}
        _run("evaluate", model, changes, settings, redo=True, as_json=as_json)
        return
    values = {"tasks": chosen, "limit": limit}
    values |= {key.removeprefix("evaluate."): value for key, value in _settings(settings).items()}
    result = standalone.evaluate(model, teacher=teacher, data=data, tokens=tokens or "64k", settings=values)
    typer.echo(json.dumps(result)) if as_json else standalone.show(result)


_stage_command("report", "Write 5-report.json, report.html and the model card from what a run holds.")


def main() -> None:
    """The `prunus` command. Exit code 2 for a mistake of the user's, with the message alone."""
    # OpenMP's threads otherwise spin for milliseconds at each barrier, which on a machine shared with others makes a
    # step several times slower; not to spin at all costs a tenth. Read when torch is loaded, which nothing above does.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        code = app(standalone_mode=False)  # typer turns Ctrl-C into this code, and hands it back
    except Stopped as error:
        console.ERRORS.print(str(error))
        sys.exit(128 + signal.SIGTERM)
    except PrunusError as error:
        _fail(str(error))
    except OSError as error:
        path = error.filename or "a file"
        _fail(f"{path}: {error.strerror or error}. Check the path and its permissions, and run the same command again.")
    except Exception as error:
        show: Callable[[], None] | None = getattr(error, "show", None)
        if show is None:
            raise
        show()  # click's own usage errors
        sys.exit(2)
    if code == INTERRUPTED:
        console.ERRORS.print("Stopped. Run the same command again to go on.")
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    console.ERRORS.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
