"""Commands about what the package ships: `ppcl adapters` and `ppcl recipes`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl_toolkit import console
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.values import check_call

recipes_app = typer.Typer(help="Recipes in the package, and what a recipe may hold.", no_args_is_help=True)
adapters_app = typer.Typer(
    help="Families that can be compressed, and adapters for others.", invoke_without_command=True
)


@adapters_app.callback()
def adapters(context: typer.Context) -> None:
    """List the families that can be compressed, and what may go of each; write or check an adapter for another."""
    if context.invoked_subcommand is not None:
        return
    from ppcl_toolkit.adapter import installed_adapters

    rows = [[name, a.transformer, *a.allows.values()] for name, a in installed_adapters().items()]
    console.print_rows(["adapter", "transformer", "depth", "FFN", "text", "modulation"], *rows)


@adapters_app.command("check")
def check_adapter(
    name: Annotated[str, typer.Argument(help="Adapter, by its name or as package.module:NAME.")],
    pipeline: Annotated[
        str | None, typer.Option(help="Folder of a pipeline, a small one; by default a random model of the class.")
    ] = None,
    call: Annotated[list[str] | None, typer.Option(help="Argument of the pipeline, name=value.")] = None,
) -> None:
    """Try what an adapter allows: noise, blocks one by one, and every kind of plan, saved and opened again."""
    from ppcl_toolkit.adapter import import_beside
    from ppcl_toolkit.kit.trial import trials

    import_beside(name, ".")
    found = list(trials(name, pipeline, call_arguments(call or [])))
    console.print_rows(["tried", "found"], *([trial.name, trial.result] for trial in found))
    if not all(trial.works for trial in found):
        raise typer.Exit(1)


@adapters_app.command("new")
def new_adapter(
    source: Annotated[str, typer.Argument(help="Class of a transformer in diffusers, or folder of a pipeline.")],
    out: Annotated[Path | None, typer.Option(help="File to write; <family>.py by default.")] = None,
    call: Annotated[list[str] | None, typer.Option(help="Argument of the pipeline, name=value.")] = None,
) -> None:
    """Write an adapter, and a test of it, by running a model: what is found, and marked DECIDE what is not."""
    from ppcl_toolkit.artifacts.files import write_text
    from ppcl_toolkit.kit.finding import OPEN
    from ppcl_toolkit.kit.new import new
    from ppcl_toolkit.kit.writing import write_test

    family, text = new(source, call_arguments(call or []))
    path = out or Path(f"{family}.py")
    for file in (path, path.with_name(f"test_{path.stem}.py")):
        if file.exists():
            raise PpclError(f"{file} exists already; name another file with --out")
    write_text(path, text)
    where = str(Path(source).resolve()) if Path(source).is_dir() else None
    write_text(path.with_name(f"test_{path.stem}.py"), write_test(path.stem, where, call_arguments(call or [])))
    for line in text.splitlines():
        if OPEN in line or "left out" in line:
            typer.echo(line.strip(" #"))
    typer.echo(f"{path}: adapter: {path.stem}:ADAPTER in a recipe beside it; test_{path.stem}.py tries what it says")


@recipes_app.command("list")
def list_recipes() -> None:
    """List the shipped recipes."""
    from ppcl_toolkit.recipe_files import shipped_comparisons, shipped_recipes

    for name in [*shipped_recipes(), *shipped_comparisons()]:
        typer.echo(name)


@recipes_app.command()
def show(name: Annotated[str, typer.Argument(help="Shipped recipe; or slurm, a job for several machines.")]) -> None:
    """Print a shipped recipe, comments and all: a start for one of your own."""
    from ppcl_toolkit.recipe_files import shipped_text

    typer.echo(shipped_text(name), nl=False)


@recipes_app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from ppcl_toolkit.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def call_arguments(pairs: list[str]) -> dict[str, Any]:
    """Return the arguments of a pipeline that `--call name=value` gives; what none could take is a `PpclError`."""
    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise PpclError(f"--call {pair!r}: expected name=value")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    try:
        check_call(arguments)
    except ValueError as error:
        raise PpclError(f"--{str(error).replace('.', ' ', 1)}") from error
    return arguments
