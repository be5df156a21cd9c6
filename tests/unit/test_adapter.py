"""Adapters are found by name, by reference and by class, and every mistake lists the choices."""

import importlib.metadata
import sys

import pytest

from ppcl_toolkit.adapter import Adapter, Stack, adapter_for, adapter_of, available_adapters, load_adapter
from ppcl_toolkit.errors import PpclError

OTHER = Adapter(family="other", transformer="OtherTransformer", stacks=(Stack(path="blocks", depth_key="depth"),))


def test_a_shipped_family_is_loaded_by_name():
    flux = load_adapter("flux")
    assert flux.family == "flux"
    assert flux is load_adapter("ppcl_toolkit.adapters.flux:ADAPTER")
    assert "flux" in available_adapters()


def test_every_available_adapter_loads_and_knows_its_stacks():
    for name in available_adapters():
        adapter = load_adapter(name)
        assert adapter.stacks, name
        for stack in adapter.stacks:
            assert adapter.stack(stack.path) is stack


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sd3"])
def test_a_shipped_family_is_picked_by_the_class_of_the_transformer(family):
    adapter = load_adapter(family)
    assert adapter_for(adapter.transformer) is adapter


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
