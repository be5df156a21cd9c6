"""Small transformers that keep, number or change something where an adapter would not look for it."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from parts import randomize
from torch import nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.running.schedule import Runner

WIDTH = 8
GAINS = (1.0, 1.3, 0.7, 1.5, 0.6, 1.2)


class Processor:
    """What runs a block's gate, and knows a number."""

    def __init__(self, number: int) -> None:
        self.number = number


class Block(nn.Module):
    """A residual MLP over tokens [B, N, D], of a conditioning [B, D]; with what `kind` has beside."""

    def __init__(self, kind: str, number: int, gain: float) -> None:
        super().__init__()
        self.kind = kind
        self.linear, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if kind == "list":
            self.gains = [1.0, {"own": gain}]
        elif kind == "private":
            self._gain = gain
        elif kind == "object":
            self.processor = Processor(number)
        elif kind == "tensor":
            self.gain = torch.tensor(gain)
        elif kind == "buffer":
            self.register_buffer("gain", torch.tensor(gain), persistent=False)
        elif kind == "config":
            self.gain = gain

    def own_gain(self):
        found = {
            "list": lambda: self.gains[1]["own"],
            "private": lambda: self._gain,
            "object": lambda: 1 + self.processor.number,
            **dict.fromkeys(("tensor", "buffer", "config"), lambda: self.gain),
        }
        return found.get(self.kind, lambda: 1.0)()

    def forward(self, hidden_states, temb=None, **kwargs):
        kind = self.kind
        temb = kwargs["temb_inside"] if kind == "kwargs" else self.temb if kind == "attribute" else temb
        change = torch.tanh(self.down(torch.tanh(self.up(hidden_states + self.linear(temb)[:, None]))))
        if kind == "dropout":
            change = nn.functional.dropout(change, 0.5, training=True)
        if kind == "in_place":
            return hidden_states.add_(change)
        return hidden_states + self.own_gain() * change


class Hostile(ModelMixin, ConfigMixin):
    """A DiT of one stack."""

    @register_to_config
    def __init__(self, num_layers: int = 6, kind: str = "plain", gains: tuple = GAINS) -> None:
        super().__init__()
        assert kind != "asserts" or len(gains) == num_layers, "one gain for each layer"
        self.blocks = nn.ModuleList(Block(kind, i, gains[i]) for i in range(num_layers))
        self.time, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self._scale, self.calls, self.kept = num_layers**-0.5, 0, None

    def forward(self, hidden_states, timestep, timestep_r=None, return_dict=True):  # noqa: ARG002 - one of each kind
        kind, x, behind = self.config.kind, hidden_states, []
        temb = self.time(timestep[:, None])
        if kind == "counts":
            self.calls += 1
            x = x * (1 + 0.1 * self.calls)
        if kind == "attribute":
            for block in self.blocks:
                block.temb = temb
        for i, block in enumerate(self.blocks):
            if kind == "late" and float(timestep[0]) < 0.5 and i == 3:
                x = x * 1.5
            if kind == "half" and i >= 4:
                x = x + behind[2]
            x = block(x, **({"temb_inside": temb} if kind == "kwargs" else {"temb": temb}))
            if kind == "conditioned":
                temb = temb + x.mean(1)
            behind.append(x)
        if kind == "tap":
            x = x + behind[-2]
        return (self.out(x * self._scale if kind == "scale" else x),)


class Pair(nn.Module):
    """Two streams of the same shape, each of which sees the other."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, encoder_hidden_states):
        image = hidden_states + torch.tanh(self.own(hidden_states) + self.other(encoder_hidden_states))
        text = encoder_hidden_states + torch.tanh(self.other(encoder_hidden_states) - hidden_states)
        made = [text, image]
        return tuple(made)


class Pairs(ModelMixin, ConfigMixin):
    """A DiT of one stack of pairs."""

    @register_to_config
    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(num_layers))

    def forward(self, hidden_states, encoder_hidden_states, timestep, return_dict=True):  # noqa: ARG002
        image, text = hidden_states * (1 + timestep[:, None, None]), encoder_hidden_states
        for block in self.blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text)
        return (image,)


def runner(kind: str) -> Runner:
    """The teacher of a kind, with what a user may write in good faith."""
    torch.manual_seed(0)
    stack = Stack(path="blocks", depth_key="num_layers", text=None, returns=("image",))
    adapter = Adapter(family=f"hostile_{kind}", transformer="Hostile", stacks=(stack,))
    return Runner(randomize(Hostile(kind=kind)).requires_grad_(False).eval(), adapter)


def pairs(**fields) -> Runner:
    """A teacher of two streams, with some fields of its stack."""
    torch.manual_seed(0)
    stack = Stack(path="blocks", depth_key="num_layers", **fields)
    adapter = Adapter(family="pairs", transformer="Pairs", stacks=(stack,))
    return Runner(randomize(Pairs()).requires_grad_(False).eval(), adapter)


def call(level: float = 0.7) -> dict:
    """One call of any."""
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(2, 3, WIDTH), "timestep": torch.full((2,), level), "return_dict": False}


def pair_call() -> dict:
    return {**call(), "encoder_hidden_states": torch.randn(2, 3, WIDTH)}
