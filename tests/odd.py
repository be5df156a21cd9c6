"""Small transformers, each of which does something with its blocks that an adapter cannot tell."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from parts import randomize
from torch import nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.running.schedule import Runner

WIDTH = 8
_SIDES = ("sides", "refiners")
"""Kinds with two more stacks."""
KINDS = (
    *("plain", "skip", "changed", "tap", "table", "gain", "numbered", "captions", "buffer", "window", "twice"),
    *("sequence", "memory", *_SIDES),
)


class Memory:
    """What the first block leaves for all behind it."""

    tokens = None


MEMORY = Memory()


class Block(nn.Module):
    """A residual MLP over tokens [B, N, D], of a conditioning [B, D]."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        if number is not None:
            self.number = number
        self.name = f"block {number}"
        self.memory = None
        self.linear, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden_states, temb, skip=None, captions=None, lead=False):
        x = hidden_states if skip is None else hidden_states + skip
        if lead:
            self.memory.tokens = hidden_states
        elif self.memory is not None:
            hidden_states = hidden_states + 0.5 * self.memory.tokens
        x = x + (0 if captions is None else captions) + self.linear(temb)[:, None]
        return (hidden_states + torch.tanh(self.down(torch.tanh(self.up(x))))) * (1 + getattr(self, "number", 0))


class Odd(ModelMixin, ConfigMixin):
    """A DiT of one stack, or of two."""

    @register_to_config
    def __init__(self, num_layers: int = 5, left_layers: int = 0, right_layers: int = 0, kind: str = "plain") -> None:
        super().__init__()
        numbered = kind == "numbered"
        self.blocks = nn.ModuleList(Block(i if numbered else None) for i in range(num_layers))
        self.left, self.right = (nn.ModuleList(Block() for _ in range(n)) for n in (left_layers, right_layers))
        self.captions = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers if kind == "captions" else 0))
        if kind == "memory":
            for block in self.blocks:
                block.memory = MEMORY
        self.time, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        if kind in ("table", "buffer", "window"):
            self.register_buffer("table", torch.arange(num_layers * 1.0), persistent=False)

    def forward(self, hidden_states, timestep, return_dict=True):  # noqa: C901, ARG002 - one of each kind
        kind, first, x = self.config.kind, None, hidden_states
        temb = self.time(timestep[:, None])
        if kind == "sides":
            x, other = hidden_states, hidden_states
            for one, two in zip(self.left, self.right, strict=True):
                x, other = one(x, temb), two(other, temb)
            x = x + other
        if kind == "refiners":
            other = x
            for block in self.left:
                x = block(x, temb)
            for block in self.right:
                other = block(other, temb)
            x = x + other
        if kind == "sequence":
            x, temb = x.transpose(0, 1), temb[:1]
        for i, block in enumerate(self.blocks):
            given = {"lead": True} if kind == "memory" and i == 0 else {}
            if kind == "skip" and i == 3:
                given["skip"] = first
            if kind == "captions":
                given["captions"] = self.captions[i](temb)[:, None]
            if kind in ("table", "buffer"):
                # Slices of a table, as if it had a row for every block.
                given["captions"] = self.table[i if kind == "table" else i - len(self.table)]
            if kind == "window":
                given["captions"] = self.table[max(i - 1, 0) : i + 1].sum()
            if kind == "changed":
                x = x * 1.5
            x = block(x, temb, **given)
            if kind == "gain":
                x = x * (1 + i)
            if kind == "twice" and i == 2:
                x = block(x, temb)
            if i == 1 and kind in ("skip", "tap"):
                first = x
        if kind == "sequence":
            x = x.transpose(0, 1)
        return (self.out(x if first is None or kind == "skip" else x + first),)


def adapter(kind: str) -> Adapter:
    """What a user may write, in good faith."""
    own = Stack(path="blocks", depth_key="num_layers", text=None, returns=("image",))
    sides = [Stack(path=s, depth_key=f"{s}_layers", text=None, returns=("image",)) for s in ("left", "right")]
    return Adapter(family=f"odd_{kind}", transformer="Odd", stacks=(*sides, own) if kind in _SIDES else (own,))


def runner(kind: str) -> Runner:
    """The teacher of a kind."""
    torch.manual_seed(0)
    sides = {"left_layers": 2, "right_layers": 2} if kind in _SIDES else {}
    return Runner(randomize(Odd(**sides, kind=kind)).requires_grad_(False).eval(), adapter(kind))


def call() -> dict:
    """One call of any."""
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(2, 3, WIDTH), "timestep": torch.rand(2), "return_dict": False}
