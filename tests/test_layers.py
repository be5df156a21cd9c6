"""Imports point down only, and every third-party library has its place (DESIGN)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "ppcl_toolkit").rglob("*.py"), *(ROOT / "adapters").glob("*.py")])
PLACES = {
    "typer": ("ppcl_toolkit/cli.py", "ppcl_toolkit/subcommands.py"),
    "rich": ("ppcl_toolkit/console.py",),
    "yaml": ("ppcl_toolkit/recipe_files.py", "ppcl_toolkit/values.py"),
    "accelerate": ("ppcl_toolkit/processes.py", "ppcl_toolkit/running/placement.py", "ppcl_toolkit/shapes/"),
    "torch.fx": ("ppcl_toolkit/surgery/graph.py", "ppcl_toolkit/surgery/source.py", "ppcl_toolkit/running/meta.py"),
    "diffusers": (
        "ppcl_toolkit/artifacts/pipeline.py",
        "ppcl_toolkit/artifacts/variant.py",
        "ppcl_toolkit/artifacts/classes.py",
        "ppcl_toolkit/surgery/modelling.py",
        "ppcl_toolkit/artifacts/published.py",
        "ppcl_toolkit/budget/model.py",
        "ppcl_toolkit/shapes/",
    ),
    "transformers": (
        "ppcl_toolkit/artifacts/pipeline.py",
        "ppcl_toolkit/training/optimizers.py",
        "ppcl_toolkit/shapes/",
    ),
    "torchao": ("ppcl_toolkit/training/optimizers.py", "ppcl_toolkit/training/lowbit.py"),
    "scipy": ("ppcl_toolkit/selection/program.py", "ppcl_toolkit/comparison/verdict.py"),
    "matplotlib": ("ppcl_toolkit/stages/figures.py", "ppcl_toolkit/shapes/"),
    "jinja2": ("ppcl_toolkit/stages/report.py", "ppcl_toolkit/surgery/modelling.py"),
}
FLOORS = (
    tuple(
        f"ppcl_toolkit/{name}.py"
        for name in (
            "errors",
            "ending",
            "values",
            "records",
            "trouble",
            "units",
            "adapter",
            "plan",
            "ties",
            "processes",
        )
    ),
    ("ppcl_toolkit/statistics/",),
    ("ppcl_toolkit/running/",),
    ("ppcl_toolkit/surgery/",),
    ("ppcl_toolkit/artifacts/",),
    ("ppcl_toolkit/checking/",),
    ("ppcl_toolkit/training/",),
    ("ppcl_toolkit/selection/",),
    ("ppcl_toolkit/stages/",),
    ("ppcl_toolkit/budget/", "ppcl_toolkit/kit/"),
    ("ppcl_toolkit/rules/", "ppcl_toolkit/methods/"),
    ("ppcl_toolkit/algorithm.py",),
    ("ppcl_toolkit/comparison/",),
    ("ppcl_toolkit/console.py",),
    ("ppcl_toolkit/subcommands.py",),
    ("ppcl_toolkit/cli.py",),
)
"""The rooms of the core from the ground up: a file imports from its own floor or from one below."""
APART = {
    "ppcl_toolkit/shapes/": ("ppcl_toolkit.stages", "ppcl_toolkit.training", "ppcl_toolkit.algorithm"),
    "adapters/": ("ppcl_toolkit.stages", "ppcl_toolkit.training", "ppcl_toolkit.algorithm"),
}
WITHOUT_RECIPES = tuple(f"ppcl_toolkit/{room}/" for room in ("statistics", "running", "surgery", "training"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports; names are counted as modules, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_of(place: str) -> str:
    return place.removesuffix(".py").strip("/").replace("/", ".")


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path):
    name = path.relative_to(ROOT).as_posix()
    above = [package for layer, others in APART.items() if name.startswith(layer) for package in others]
    for number, floor in enumerate(FLOORS):
        if name.startswith(floor):
            above += [module_of(place) for higher in FLOORS[number + 1 :] for place in higher]
    if name.startswith(WITHOUT_RECIPES):
        above.append("ppcl_toolkit.recipe")
    # The report reads what the other stages wrote, with their own readers.
    if name.startswith("ppcl_toolkit/stages/") and name != "ppcl_toolkit/stages/report.py":
        above.append("ppcl_toolkit.stages")
    wrong = [module for module in imports(path) for package in above if inside(module, package)]
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
        if name.startswith((*WITHOUT_RECIPES, "ppcl_toolkit/stages/")):
            code = ast.dump(ast.parse(path.read_text())).lower()
            words = [w for w in ("fluxtransformer", "qwenimage", "sd3transformer") if w in code]
            assert not words, f"{name} knows {words}"


PICKLES = ("pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path):
    """Weights and states are safetensors, everything else is JSON, YAML or text: no file that is read runs code."""
    tree = ast.parse(path.read_text())
    assert not [module for module in imports(path) if module.split(".")[0] in PICKLES or module == "torch.load"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in (("torch", "load"), ("torch", "save")), f"line {node.lineno}"
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            assert keyword.arg != "allow_pickle" or not getattr(keyword.value, "value", True), f"line {node.lineno}"
            assert keyword.arg != "trust_remote_code", f"line {node.lineno}"
