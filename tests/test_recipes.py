"""Every shipped recipe is valid, and every key of every section says what it is."""

import importlib.resources

import pytest
import yaml

from ppcl_toolkit.adapter import available_adapters
from ppcl_toolkit.comparison.asked import Comparison
from ppcl_toolkit.recipe import PRESETS, Recipe
from ppcl_toolkit.recipe_files import shipped_comparisons, shipped_recipes
from ppcl_toolkit.rules.method import find_methods
from ppcl_toolkit.units import parse_size


def source(name):
    return (importlib.resources.files("ppcl_toolkit.recipes") / f"{name}.yaml").read_text()


def keys(node, path=()):
    """Yield the path and the line, from 0, of every key that has a value of its own."""
    for key, value in node.value:
        here = (*path, key.value)
        yield here, key.start_mark.line, value
        if isinstance(value, yaml.MappingNode) and value.flow_style is False:
            yield from keys(value, here)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid(name):
    recipe = Recipe.load(name)
    assert recipe.adapter in ("auto", *available_adapters())
    for target in recipe.targets:
        assert target.modulation or target.asked
        assert all(0 < parse_size(size, 10**15, unit) < 10**15 for unit, size in target.asked.items())


@pytest.mark.parametrize("name", shipped_comparisons())
def test_a_shipped_comparison_is_valid(name):
    comparison = Comparison.load(name)
    methods = [method.name for method in find_methods(comparison.methods)]
    assert comparison.reference in methods
    job = comparison.recipe()
    assert True not in comparison.levers or job.modulation is not None
    assert len(comparison.seeds) >= 3


@pytest.mark.parametrize("name", [*shipped_recipes(), *shipped_comparisons()])
def test_a_shipped_recipe_begins_with_what_it_is_and_how_to_run_it(name):
    head = [line for line in source(name).splitlines()[:8] if line.startswith("#")]
    assert any(f"--recipe {name}" in line for line in head), f"{name}.yaml does not say how it is run"


@pytest.mark.parametrize("name", [*shipped_recipes(), *shipped_comparisons()])
def test_every_key_of_a_section_carries_a_comment(name):
    lines = source(name).splitlines()
    said = {}
    for path, line, value in keys(yaml.compose(source(name))):
        if len(path) != 2 and not isinstance(value, yaml.ScalarNode):
            continue
        above = line > 0 and lines[line - 1].strip().startswith("#")
        if "#" in lines[line] or above:
            said.setdefault(path[-1], path)
            continue
        # A key of several sections is explained once, where it first appears.
        assert path[-1] in said, f"{name}.yaml line {line + 1}: {'.'.join(path)} has no comment"


def test_a_preset_names_only_known_keys():
    base = {"teacher": {"path": "shapes"}, "targets": [{"name": "a", "params": "50%"}]}
    for preset in PRESETS.values():
        Recipe.model_validate({**base, **preset})
