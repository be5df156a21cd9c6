"""Classes that adapters name: those of diffusers, one's own, and what is neither."""

import sys
import types
from dataclasses import replace

import pytest
from diffusers import ConfigMixin, DiffusionPipeline, FluxTransformer2DModel, ModelMixin
from families import FLUX
from torch import nn

from ppcl_toolkit.adapter import Adapter, adapter_for
from ppcl_toolkit.artifacts.classes import homes, pipeline_class, stock_class
from ppcl_toolkit.errors import PpclError


class Right(ModelMixin, nn.Identity, ConfigMixin):
    pass


class Reversed(ModelMixin, ConfigMixin, nn.Identity):
    pass


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """This file as a module of a user's."""
    module = types.ModuleType("my_models")
    vars(module).update(Right=Right, Reversed=Reversed, Plain=nn.Identity, Pipe=DiffusionPipeline, __file__=__file__)
    monkeypatch.setitem(sys.modules, "my_models", module)


def named(transformer: str, pipeline: str | None = None) -> Adapter:
    return replace(FLUX, family="mine", transformer=transformer, pipeline=pipeline)


def test_classes_are_of_diffusers_or_ones_own():
    assert stock_class(FLUX) is FluxTransformer2DModel
    assert pipeline_class(FLUX) is pipeline_class(None) is DiffusionPipeline
    assert stock_class(named("my_models:Right")) is Right
    assert named("my_models:Right").class_name == "Right"
    assert homes(FLUX) == []
    assert len(homes(named("my_models:Right", "my_models:Pipe"))) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "FluxTransformer",
            "adapter 'mine': transformer 'FluxTransformer': diffusers has no such class; package.module:",
        ),
        (
            "FluxPipeline",
            "transformer 'FluxPipeline' is 'FluxPipeline', which is no diffusers.ModelMixin and diffusers.C",
        ),
        ("my_models:Plain", "transformer 'my_models:Plain' is 'Identity', which is no diffusers.ModelMixin"),
        (
            "my_models:Reversed",
            "my_models:Reversed: ConfigMixin must be the last of its bases, or no weights can be read",
        ),
        (
            "my_models:Wrong",
            "adapter 'mine': transformer 'my_models:Wrong' cannot be imported: module 'my_models' has no",
        ),
        ("no_models:Right", "cannot be imported: No module named 'no_models'; put its folder on PYTHONPATH"),
    ],
)
def test_what_is_no_class_of_a_transformer_is_one_sentence(name, said):
    with pytest.raises(PpclError, match=said):
        stock_class(named(name))


def test_what_is_no_class_of_a_pipeline_is_one_sentence():
    with pytest.raises(
        PpclError, match="pipeline 'my_models:Right' is 'Right', which is no diffusers.DiffusionPipeline"
    ):
        pipeline_class(named("my_models:Right", "my_models:Right"))


def test_an_adapter_of_ones_own_class_fits_by_its_name(monkeypatch):
    monkeypatch.setattr(sys.modules["my_models"], "ADAPTER", named("my_models:Right"), raising=False)
    assert adapter_for("Right", "my_models:ADAPTER").family == "mine"
    with pytest.raises(PpclError, match="is for my_models:Right, the teacher has a Wrong"):
        adapter_for("Wrong", "my_models:ADAPTER")
