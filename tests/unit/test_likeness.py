"""What is drawn of one block stands for its like alone: attributes, classes and shapes tell blocks apart."""

import copy
import functools

import pytest
import torch
from families import FAMILIES
from torch import nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.surgery import narrow
from ppcl_toolkit.surgery.likeness import likeness


class Gained(nn.Module):
    """A block whose gain is no weight."""

    def __init__(self, gain):
        super().__init__()
        self.gain, self.ff = gain, nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))
        self.attn = nn.Linear(4, 4)

    def forward(self, hidden_states):
        between = hidden_states + self.attn(hidden_states)
        return between + self.gain * self.ff(between)


class Processor:
    def __init__(self, kind):
        self.kind = kind


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_make_no_difference(family):
    for _, block, *_ in FAMILIES[family]():
        other = copy.deepcopy(block)
        for parameter in other.parameters():
            nn.init.ones_(parameter)
        assert likeness(block) == likeness(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "gain", 2.0),
        lambda block: setattr(block, "gain", 1),
        lambda block: setattr(block.ff[0], "bias", None),
        lambda block: setattr(block, "ff", nn.Linear(4, 4, dtype=torch.float64)),
        lambda block: setattr(block, "ff", nn.Identity()),
        lambda block: setattr(block, "ff", block.attn),
        lambda block: block.register_buffer("table", torch.ones(2)),
        lambda block: setattr(block, "processor", Processor("other")),
        lambda block: setattr(block, "act", functools.partial(nn.functional.gelu, approximate="tanh")),
        lambda block: block.eval(),
    ],
)
def test_anything_else_does(change):
    one, other = Gained(1.0), Gained(1.0)
    one.processor = other.processor = Processor("one")
    one.act = other.act = functools.partial(nn.functional.gelu, approximate="none")
    assert likeness(one) == likeness(other)
    change(other)
    assert likeness(one) != likeness(other)


def test_what_cannot_be_told_is_said():
    def closed(gain):
        return lambda value: gain * value

    class Kept:
        def __reduce__(self):
            raise OSError("of this machine")

    for value in (closed(1.0), torch, (each for each in ()), Kept()):
        with pytest.raises(TypeError):
            likeness({"it": value})


def test_a_block_with_another_constant_is_drawn_anew(monkeypatch):
    monkeypatch.setattr(narrow, "_DRAWN", {})
    monkeypatch.setattr(narrow.graph, "_is_attention", lambda _, node: node.target == "attn")
    stack = Stack(path="blocks", depth_key="n", text=None, returns=("image",), ffn={"image": "ff"})
    streams = Streams(torch.ones(1, 2, 4), None)
    form = Form("blocks", 0, 0, ffn=("image",))
    drawn = [narrow.draw(Gained(gain), stack, form, {}, streams) for gain in (1.0, 1.0, 3.0)]
    assert drawn[0] is drawn[1] and len(narrow._DRAWN) == 2
