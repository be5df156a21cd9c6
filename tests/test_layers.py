"""Imports point down only, and every third-party library has its place (DESIGN)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "ppcl_toolkit").rglob("*.py"), *(ROOT / "adapters").glob("*.py")])
PLACES = {
    "typer": ("ppcl_toolkit/cli.py",),
    "rich": ("ppcl_toolkit/cli.py",),
    "yaml": ("ppcl_toolkit/recipe.py",),
    "accelerate": ("ppcl_toolkit/mechanics/loop.py", "ppcl_toolkit/shapes/"),
    "torch.fx": ("ppcl_toolkit/mechanics/graph.py", "ppcl_toolkit/mechanics/source.py"),
    "diffusers": (
        "ppcl_toolkit/pipeline.py",
        "ppcl_toolkit/variant.py",
        "ppcl_toolkit/modelling.py",
        "ppcl_toolkit/published.py",
        "ppcl_toolkit/dry_run.py",
        "ppcl_toolkit/shapes/",
    ),
    "transformers": ("ppcl_toolkit/pipeline.py", "ppcl_toolkit/shapes/"),
    "matplotlib": ("ppcl_toolkit/stages/figures.py", "ppcl_toolkit/shapes/"),
    "jinja2": ("ppcl_toolkit/stages/report.py", "ppcl_toolkit/modelling.py"),
}
LAYERS = [
    (
        "ppcl_toolkit/mechanics/",
        ("ppcl_toolkit.stages", "ppcl_toolkit.recipe", "ppcl_toolkit.compress", "ppcl_toolkit.cli"),
    ),
    ("ppcl_toolkit/plan.py", ("ppcl_toolkit.stages", "ppcl_toolkit.mechanics", "ppcl_toolkit.recipe")),
    ("ppcl_toolkit/adapter.py", ("ppcl_toolkit.stages", "ppcl_toolkit.mechanics", "ppcl_toolkit.plan")),
    ("ppcl_toolkit/shapes/", ("ppcl_toolkit.stages", "ppcl_toolkit.mechanics", "ppcl_toolkit.compress")),
    ("ppcl_toolkit/stages/", ("ppcl_toolkit.stages", "ppcl_toolkit.compress", "ppcl_toolkit.cli")),
    ("adapters/", ("ppcl_toolkit.stages", "ppcl_toolkit.mechanics", "ppcl_toolkit.compress")),
]


def imports(path: Path) -> set[str]:
    """Modules that a file imports; names are counted as modules, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path):
    name = path.relative_to(ROOT).as_posix()
    for layer, above in LAYERS:
        if name.startswith(layer):
            wrong = [m for m in imports(path) for package in above if inside(m, package)]
            if name == "ppcl_toolkit/stages/report.py":
                # It reads what the other stages wrote, with their own readers.
                wrong = [m for m in wrong if not inside(m, "ppcl_toolkit.stages")]
            assert not wrong, f"{name} must not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_library_is_imported_where_it_belongs(path):
    name = path.relative_to(ROOT).as_posix()
    for library, places in PLACES.items():
        if any(inside(module, library) for module in imports(path)):
            assert any(name.startswith(place) for place in places), f"{name} must not import {library}"


def test_the_core_names_no_family():
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("ppcl_toolkit/mechanics/", "ppcl_toolkit/stages/")):
            code = ast.dump(ast.parse(path.read_text())).lower()
            words = [w for w in ("fluxtransformer", "qwenimage", "sd3transformer") if w in code]
            assert not words, f"{name} knows {words}"
