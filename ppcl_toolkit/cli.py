"""Commands. Heavy imports wait until a command needs them."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ppcl_toolkit import console
from ppcl_toolkit.ending import Ended, end_on_signals, unexpected
from ppcl_toolkit.errors import PpclError, PpclWarning
from ppcl_toolkit.subcommands import adapters_app, call_arguments, recipes_app
from ppcl_toolkit.units import UNITS

app = typer.Typer(
    help="Compress Diffusion Transformers: pluggable pruning with contiguous layer distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(adapters_app, name="adapters")


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error that nobody expected.")
    ] = False,
) -> None:
    """Compress Diffusion Transformers: pluggable pruning with contiguous layer distillation."""


_SEEDS = 2**32 - 1
"""The largest there is; several prompts take as many from the first on."""
Verify = Annotated[bool, typer.Option(help="Hash the files of variants, and of the run, before they are read.")]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of a run.")]


def main() -> None:
    """Run a command; a user's mistake is one line, and an interrupted run says how it goes on."""
    warnings.filterwarnings("ignore")
    warnings.simplefilter("always", PpclWarning)
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
    for library in ("transformers", "diffusers", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    end_on_signals()
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(words) < len(sys.argv) - 1
    try:
        code = app(words, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except PpclError as error:
        _stop(f"error: {error}", 1)
    except Ended as end:
        _stop(f"ended by {end.name}: what is finished is kept, and the same command goes on from here", end.code)
    except Exception as error:
        # What typer raises for words that it does not know carries its own exit code and message.
        code = getattr(error, "exit_code", None)
        if code is not None:
            _stop(f"error: {getattr(error, 'format_message', lambda: '')()}", code)
        from ppcl_toolkit.trouble import explained

        if debug:
            raise
        _stop(f"error: {explained(error) or unexpected(error, _run_folders(words))}", 1)


def _run_folders(words: list[str]) -> list[Path]:
    """Return the folder of the run that a command works in, where it has one."""
    named = [Path(value) for option, value in zip(words, words[1:], strict=False) if option in ("--out", "--run")]
    return [folder for folder in named if (folder / "recipe.yaml").is_file()]


@app.command()
def compress(
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of a shipped recipe.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<recipe> by default.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, any number of times.")] = None,
    remake: Annotated[
        bool, typer.Option("--remake", help="Make damaged stages again, and what depends on them.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Hash the files of finished stages, of up to 32 GB each, and of variants.")
    ] = True,
) -> None:
    """Turn a teacher into smaller models. The same command continues a run that was stopped."""
    from ppcl_toolkit import Recipe
    from ppcl_toolkit import compress as run

    asked = Recipe.load(recipe, set_ or [])
    folder = out or Path("runs") / Path(recipe).stem
    with console.drawn() as progress:
        summary = run(asked, folder, progress=progress, remake=remake, verify=verify)
    from ppcl_toolkit import processes

    if not processes.is_main():
        return
    console.print_table(summary)
    for variant in summary["variants"]:
        typer.echo(f"{variant['name']}: {variant['path']} ({variant['opens']})")
    typer.echo(f"report: {folder / 'report.html'}")
    for warning in summary["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


@app.command()
def plan(  # noqa: PLR0913 - options
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of a shipped recipe.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, any number of times.")] = None,
    card: Annotated[str | None, typer.Option(help="Memory of a GPU: 24GB. Default: this machine's.")] = None,
    host: Annotated[str | None, typer.Option(help="Memory of the machine: 64GB. Default: this machine's.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs of that machine.")] = 1,
    tflops: Annotated[float, typer.Option(min=1e-6, help="What one device sustains, for the time estimate.")] = 400.0,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data instead of tables.")] = False,
    against: Annotated[
        str | None, typer.Option(help="Another recipe, of the same teacher: a table of its plans, and of equal ones.")
    ] = None,
) -> None:
    """Say what a recipe would remove, need and take, and whether a machine has it: in seconds and without weights."""
    from ppcl_toolkit import Recipe
    from ppcl_toolkit.artifacts.pipeline import quiet
    from ppcl_toolkit.budget import HEADER, dry_run, machine_of, side_by_side

    asked = Recipe.load(recipe, set_ or [])
    if against is not None:
        with quiet():
            rows = side_by_side(asked, Path(recipe).stem, Recipe.load(against), Path(against).stem)
        typer.echo(console.markdown(HEADER, *rows))
        return
    with quiet():
        found = dry_run(asked, tflops, machine_of(card, host, devices))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    console.print_plan(found)


@app.command()
def export(
    run: RunFolder,
    target: Annotated[str, typer.Option(help="params=60%, bytes=12GB, flops=70%, or several: params=8B,flops=70%.")],
    name: Annotated[str | None, typer.Option(help="Of the variant; the size by default.")] = None,
    verify: Verify = True,
) -> None:
    """Assemble another size from the bank of a run, without training."""
    from ppcl_toolkit import export_target

    sizes = dict(part.partition("=")[::2] for part in target.replace(" ", "").split(","))
    if not all(unit in UNITS and size for unit, size in sizes.items()) or len(sizes) != target.count("="):
        raise PpclError(f"--target {target!r}: expected params=60%, bytes=12GB or flops=70%, one or several")
    made = export_target(run, name=name, verify=verify, **sizes)
    cost = f"{made['params']:,} parameters, {made['flops']:,} FLOPs a step"
    typer.echo(f"{made['name']}: {made['path']} ({made['opens']}, {cost})")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Option("--from", help="Published checkpoint: a pipeline folder or a transformer's.")],
    out: Annotated[Path, typer.Option(help="Folder of the variant; it must not exist.")],
    pipeline: Annotated[str | None, typer.Option(help="Folder or hub id that gives the other parts.")] = None,
) -> None:
    """Make a variant of a published Qwen-Image checkpoint of the paper's authors."""
    from ppcl_toolkit.artifacts.published import import_published

    made, opens = import_published(source, out, pipeline=pipeline)
    typer.echo(f"{'; '.join(map(str, made.operations)) or 'no narrow blocks'}\n{out} ({opens})")


@app.command("eval")
def evaluate(  # noqa: PLR0913 - options
    paths: Annotated[
        list[str],
        typer.Argument(help="Pipelines: shapes, folders or hub ids; the first is the reference. With --scores, files."),
    ],
    prompts: Annotated[str, typer.Option(help="shapes, a file with one prompt a line, or a suite's own.")] = "shapes",
    count: Annotated[int | None, typer.Option(min=1, help="Prompts: 70, or all of a suite's.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Images per prompt: 0,1,2; of a suite, the first one's: 42.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    call: Annotated[list[str] | None, typer.Option(help="Argument of the pipeline, name=value.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of images and figures.")] = Path("runs/eval"),
    suite: Annotated[str | None, typer.Option(help="Draw for geneval, dpg, longtext, oneig or t2i-compbench.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Table of scorers' files: FILE or MODEL=FILE.")] = False,
    verify: Verify = True,
) -> None:
    """Draw the same images with several pipelines, and measure them side by side."""
    from ppcl_toolkit import processes
    from ppcl_toolkit.recipe import Evaluate
    from ppcl_toolkit.records import problems
    from ppcl_toolkit.stages.evaluate import evaluate_folders

    if scores:
        _print_scores(paths)
        return
    numbers = seeds or ("42" if suite else "0,1,2")
    try:
        section = Evaluate(prompts=prompts, count=count or 70, seeds=tuple(map(int, numbers.split(","))), batch=batch)
    except ValueError as error:
        said = problems(error) if isinstance(error, ValidationError) else f"--seeds: {error}"
        raise PpclError(f"options of eval: {said}") from error
    if suite:
        _draw_suite(paths, suite, section, count, {"out": out, "call": call_arguments(call or []), "verify": verify})
        return
    with console.drawn() as progress:
        rows = evaluate_folders(paths, section, call_arguments(call or []), out, progress, verify=verify)
    if not processes.is_main():
        return
    console.print_table(
        {
            "teacher": rows[0],
            "variants": [{**row, "name": Path(p).name} for p, row in zip(paths, rows, strict=True)][1:],
        }
    )


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a variant.")]) -> None:
    """Hash every file, and compare with what was recorded when it was made; exit with 1 where anything is damaged."""
    from ppcl_toolkit.artifacts.verify import verify as look

    found = look(folder)
    for name, said, whole in found:
        typer.echo(f"{ {True: 'whole', False: 'DAMAGED', None: 'unknown'}[whole]:8} {name}: {said}")
    if any(each.whole is False for each in found):
        raise typer.Exit(1)


@app.command()
def compare(
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of a shipped comparison.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/<recipe> by default.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, any number of times.")] = None,
) -> None:
    """Set methods side by side: equal sizes, equal block passes. The same command continues what was stopped."""
    from ppcl_toolkit import processes
    from ppcl_toolkit.comparison.asked import Comparison
    from ppcl_toolkit.comparison.main import compare as run
    from ppcl_toolkit.comparison.table import HEADER, cells

    asked = Comparison.load(recipe, set_ or [])
    folder = out or Path("runs") / Path(recipe).stem
    with console.drawn() as progress:
        summary = run(asked, folder, progress=progress)
    if processes.is_main():
        console.print_rows(HEADER, *(cells(row, summary["teacher"]) for row in summary["rows"]))
        typer.echo(f"figures: {folder / 'comparison.html'}")


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html of a run, finished or not."""
    from ppcl_toolkit.stages.report import write_report

    typer.echo(write_report(run))


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="shapes, a pipeline folder, a variant or a hub id.")],
    prompt: Annotated[list[str], typer.Option(help="Any number of times.")],
    seed: Annotated[int, typer.Option(min=0, max=_SEEDS, help="Of the first image; the next takes the next.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG; several prompts are set side by side.")] = Path("image.png"),
    call: Annotated[list[str] | None, typer.Option(help="Argument of the pipeline, name=value.")] = None,
    verify: Verify = True,
) -> None:
    """Draw images with any pipeline, for a look."""
    from ppcl_toolkit.artifacts.pipeline import default_call, load_pipeline
    from ppcl_toolkit.processes import pick_device
    from ppcl_toolkit.running.images import check_place, draw
    from ppcl_toolkit.running.placement import callable_on

    arguments = {**default_call(path), **call_arguments(call or [])}
    check_place(out)
    pipeline = load_pipeline(path, verify=verify)
    with callable_on(pipeline, pick_device("auto")):
        draw(pipeline, prompt, seed, arguments).save(out)
    typer.echo(out)


def _draw_suite(paths: list[str], name: str, section: Any, count: int | None, options: dict[str, Any]) -> None:
    from ppcl_toolkit import processes
    from ppcl_toolkit.benchmarks.drawing import Drawing, draw_suite
    from ppcl_toolkit.benchmarks.suites import find_suite

    if len(section.seeds) > 1:
        raise PpclError(f"--seeds: --suite {name} takes one, that of the first image of a prompt")
    asked = {"prompts": Path(section.prompts), "count": count, "seed": section.seeds[0], "batch": section.batch}
    with console.drawn() as progress:
        folders = draw_suite(paths, Drawing(suite=find_suite(name), **asked, **options), progress)
    if processes.is_main():
        for folder in folders:
            typer.echo(f"for the scorer of {name}: {folder}")


def _print_scores(files: list[str]) -> None:
    from ppcl_toolkit.benchmarks.scores import lay_out, tabulate
    from ppcl_toolkit.benchmarks.suites import read_scores

    rows, notes = tabulate(read_scores(files))
    console.print_rows(*lay_out(rows))
    typer.echo("(in brackets: R in percent, the drop against the first model)")
    for note in notes:
        typer.echo(f"warning: {note}", err=True)


def _stop(message: str, code: int) -> None:
    typer.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
