"""A user's whole way on the device of this process: compress, another size, a picture and an evaluation of a variant.

    python run_family.py compress,export,draw FOLDER OUT [section.key=value ...]

The first argument says how far. FOLDER holds `recipe.yaml` and the teacher that it names; `test_runs.py` makes it and
reads what is left in OUT.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from nursery import adopt

from ppcl_toolkit import Recipe, cli, compress, export_target


def ppcl(*arguments: str | Path) -> None:
    """Run a command of the toolkit, in this process."""
    sys.argv = ["ppcl", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, f"{arguments}: exit status {end.code}"


def main(way: list[str], folder: Path, out: Path, overrides: list[str]) -> None:
    adopt(early=True)
    tiny.small_edits()
    recipe = Recipe.load(folder / "recipe.yaml", overrides)
    (*_, variant) = compress(recipe, out)["variants"]
    if "export" in way:
        export_target(out, "85%")
    if "draw" in way:
        draw(folder, variant["path"], recipe.teacher.call, out)


def draw(folder: Path, variant: str, call: Mapping[str, Any], out: Path) -> None:
    """One picture, and the same one by teacher and variant, measured."""
    ppcl("generate", variant, "--prompt", "a circle", "--out", out / "picture.png")
    (out / "one.txt").write_text("a circle\n")
    words = [word for name, value in call.items() for word in ("--call", f"{name}={json.dumps(value)}")]
    exam = ["--prompts", out / "one.txt", "--seeds", "0", *words, "--out", out / "exam"]
    ppcl("eval", folder / "teacher", variant, *exam)


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
