"""Adapters are found by name, by reference and by class, and every mistake lists the choices."""

import importlib.metadata
import sys
import warnings
from pathlib import Path

import pytest
from diffusers import AutoModel

import ppcl_toolkit
from ppcl_toolkit import adapter
from ppcl_toolkit.adapter import (
    Adapter,
    Stack,
    adapter_for,
    adapter_of,
    available_adapters,
    home_of,
    import_beside,
    installed_adapters,
    load_adapter,
)
from ppcl_toolkit.budget import dry_run
from ppcl_toolkit.budget.model import is_known
from ppcl_toolkit.cli import main
from ppcl_toolkit.errors import PpclError, PpclWarning
from ppcl_toolkit.recipe import Recipe

OTHER = Adapter(family="other", transformer="OtherTransformer", stacks=(Stack(path="blocks", depth_key="depth"),))


def test_a_shipped_family_is_loaded_by_name():
    flux = load_adapter("flux")
    assert flux.family == "flux"
    assert flux is load_adapter("ppcl_toolkit.adapters.flux:ADAPTER")
    assert "flux" in available_adapters()


def test_every_available_adapter_loads_and_knows_its_stacks():
    for name in available_adapters():
        known = load_adapter(name)
        assert known.stacks, name
        for stack in known.stacks:
            assert known.stack(stack.path) is stack


@pytest.mark.parametrize(
    ("family", "ffn", "text", "modulation"),
    [
        ("flux", "image, text", "yes", "yes"),
        ("flux2", "image, text", "yes", "-"),
        ("aura_flow", "-", "yes", "yes"),
        ("cogview4", "-", "-", "yes"),
        ("wan", "image", "-", "-"),
    ],
)
def test_what_may_go_of_a_family_is_told(family, ffn, text, modulation):
    said = load_adapter(family).allows
    assert (said["FFN"], said["text"], said["modulation"]) == (ffn, text, modulation)
    assert said["depth"].split(", ") == [stack.path for stack in load_adapter(family).stacks]


@pytest.mark.parametrize("family", available_adapters())
def test_a_shipped_family_is_picked_by_the_class_of_the_transformer(family):
    known = load_adapter(family)
    assert adapter_for(known.transformer) is known


def test_an_adapter_of_ones_own_is_named_by_module_and_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_family.py").write_text(
        "from ppcl_toolkit.adapter import Adapter, Stack\n"
        "MINE = Adapter(family='mine', transformer='Mine', stacks=(Stack(path='blocks', depth_key='depth'),))\n"
    )
    assert load_adapter("my_family:MINE").family == "mine"


def test_an_installed_entry_point_is_loaded_by_its_name(monkeypatch):
    point = importlib.metadata.EntryPoint("elsewhere", "test_adapter:OTHER", "ppcl_toolkit.adapters")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if point.group == group else [])
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda _: OTHER)
    assert available_adapters()[-1] == "elsewhere"
    assert load_adapter("elsewhere") is OTHER
    assert adapter_for("OtherTransformer") is OTHER


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Two entry points of others, of which one has a mistake in its module."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_family.py").write_text("ADAPTER = Adaptr()\n")
    group = "ppcl_toolkit.adapters"
    points = [
        importlib.metadata.EntryPoint("broken", "broken_family:ADAPTER", group),
        importlib.metadata.EntryPoint("sound", "ppcl_toolkit.adapters.flux:ADAPTER", group),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)  # noqa: ARG005


BROKEN = (
    r"adapter 'broken' \(an entry point, broken_family:ADAPTER\) cannot be imported: NameError: name 'Adaptr' is not "
    "defined"
)


@pytest.mark.usefixtures("broken")
def test_a_broken_entry_point_of_somebody_else_is_named_and_left_out():
    adapter._warn_once.cache_clear()
    with pytest.warns(PpclWarning, match=f"{BROKEN}; it is left out") as said:
        assert {"flux", "sd3", "sound"} <= installed_adapters().keys()
        assert adapter_for("SD3Transformer2DModel") is load_adapter("sd3")
        assert is_known(Recipe.load("flux_8b"))
    assert len(said) == 1
    with pytest.raises(PpclError, match=BROKEN):
        load_adapter("broken")


@pytest.mark.usefixtures("broken")
def test_the_command_lists_the_others_and_says_which_is_broken(capsys, monkeypatch):
    adapter._warn_once.cache_clear()
    monkeypatch.setattr(sys, "argv", ["ppcl", "adapters"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 0
    assert "sound" in out and "Qwen" in out and "broken" not in out
    assert err.startswith("warning: adapter 'broken' (an entry point, broken_family:ADAPTER) cannot be imported")


def test_models_and_example_of_ones_own_adapter_serve_the_plan(tmp_path, monkeypatch):
    """Nothing is asked of the hub: what the adapter lists is known."""
    (tmp_path / "listed_family.py").write_text(
        "from dataclasses import replace\n"
        "from ppcl_toolkit.adapter import load_adapter\n"
        "FLUX = load_adapter('flux')\n"
        "ADAPTER = replace(FLUX, family='mine', models={'some/model': {'num_layers': 4, 'num_single_layers': 2}})\n"
    )
    text = (
        "adapter: listed_family:ADAPTER\nteacher: {path: some/model}\ntargets: [{name: a, params: 80%}]\n"
        "samples: {prompts: prompts.txt, count: 2}\nevaluate: {prompts: prompts.txt}\n"
    )
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModel, "load_config", lambda *_, **__: pytest.fail("the hub is asked"))
    found = dry_run(Recipe.load("recipe.yaml"))
    assert found.teacher.blocks == {"transformer_blocks": 4, "single_transformer_blocks": 2}
    assert "listed_family" not in {Path(entry).name for entry in sys.path}


def test_a_module_is_looked_for_beside_the_recipe_and_nothing_else_is_later(tmp_path):
    (tmp_path / "beside_family.py").write_text("from ppcl_toolkit.adapters.flux import ADAPTER\n")
    (tmp_path / "beside_other.py").write_text("")
    before = list(sys.path)
    import_beside("beside_family:ADAPTER", tmp_path)
    assert load_adapter("beside_family:ADAPTER") is load_adapter("flux")
    assert home_of("beside_family:ADAPTER") == str(tmp_path.resolve())
    assert sys.path == before
    with pytest.raises(PpclError, match="No module named 'beside_other'; put its folder on PYTHONPATH"):
        load_adapter("beside_other:ADAPTER")


def test_another_module_of_the_same_name_is_not_taken_for_it(tmp_path):
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "twice_family.py").write_text("from ppcl_toolkit.adapters.flux import ADAPTER\n")
    import_beside("twice_family:ADAPTER", tmp_path / "one")
    import_beside("twice_family:ADAPTER", tmp_path)
    with pytest.raises(PpclError, match="twice_family was imported from .*one before, and there is another in .*other"):
        import_beside("twice_family:ADAPTER", tmp_path / "other")


def test_the_home_of_a_package_is_the_folder_around_it():
    root = Path(ppcl_toolkit.__file__).resolve().parents[1]
    assert home_of("ppcl_toolkit.budget.model:Model") == str(root)
    assert home_of("flux") == ""


def test_a_name_in_a_file_names_no_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    with pytest.raises(PpclError, match="'stranger:ADAPTER', which is code: files may only name installed adapters"):
        adapter_of("stranger:ADAPTER")
    assert "stranger" not in sys.modules
    assert adapter_of("flux") is load_adapter("flux")
    # What a user names is loaded, whatever the file says.
    assert adapter_of("stranger:ADAPTER", "ppcl_toolkit.adapters.flux:ADAPTER") is load_adapter("flux")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(PpclError, match=r"unknown adapter 'fluxx'; available: .*flux.* or package.module:NAME"):
        load_adapter("fluxx")


@pytest.mark.parametrize(
    "reference", ["no_such_module:ADAPTER", "ppcl_toolkit.adapters.flux:NONE", "ppcl_toolkit.errors:", ":NAME", ".x:Y"]
)
def test_a_reference_that_leads_nowhere_is_one_sentence(reference):
    with pytest.raises(PpclError, match="cannot be imported") as caught:
        load_adapter(reference)
    assert "\n" not in str(caught.value)


def test_a_reference_to_something_else_says_what_it_is():
    with pytest.raises(PpclError, match="'ppcl_toolkit.errors:PpclError' is a type, not a ppcl_toolkit.Adapter"):
        load_adapter("ppcl_toolkit.errors:PpclError")


def test_the_adapter_of_a_transformer_is_found_by_its_class():
    assert adapter_for("FluxTransformer2DModel") is load_adapter("flux")
    with pytest.raises(PpclError, match=r"no adapter for UNet2DModel; available: .*flux \(FluxTransformer2DModel\)"):
        adapter_for("UNet2DModel")


def test_an_unknown_stack_lists_the_known_ones():
    with pytest.raises(PpclError, match="flux has no stack 'blocks'; it has: transformer_blocks, single_"):
        load_adapter("flux").stack("blocks")


def test_the_readme_says_what_may_go_of_each_family():
    rows = [line.split(" | ") for line in (Path(__file__).parents[2] / "README.md").read_text().splitlines()]
    told = {row[0].strip("| `"): [cell.strip(" |") for cell in row[1:]] for row in rows if len(row) == 6}
    for name, family in installed_adapters().items():
        depth, *others = family.allows.values()
        models = ", ".join(model.rpartition("/")[2] for model in family.models)
        stacks = ", ".join(f"`{path}`" for path in depth.split(", "))
        assert told.get(name) == [models, stacks, *others], name
