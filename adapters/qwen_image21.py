"""Qwen-Image 2.1: one stream of text and image, references in the places of the text that stand for them.

Blocks share one modulation. What the transformer makes has text and references before the noised tokens. Keys and
values that the pipeline keeps from its first step (`use_kv_cache`) cannot be recorded: a recipe's `teacher.call` goes
without. Variants draw with them as the teacher does.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token for 16 x 16 pixels, a text of 128 tokens, a place in it for four of a reference's."""
    sides = [(1, call.get("height", 1024) // 16, call.get("width", 1024) // 16)] * (1 + references)
    places = math.prod(sides[0]) // 4
    text = [False] * 128
    return {
        "hidden_states": (1, 4 * places * (1 + references), config["in_channels"]),
        "encoder_hidden_states": (1, len(text) + places * references, config["context_in_dim"]),
        "timestep": (1,),
        "img_shapes": [sides],
        "img_mask": torch.tensor([[*[True] * (places * references), *text, *[True] * places]]),
    }


def noised(call: Mapping[str, Any]) -> int:
    """Count the tokens of the image that is made: its (frames, height, width) are the last."""
    return math.prod(call["img_shapes"][0][-1])


ADAPTER = Adapter(
    family="qwen_image21",
    transformer="QwenImage21Transformer2DModel",
    packs=True,
    noised=noised,
    noised_last=True,
    models={"Qwen/Qwen-Image-2.1": {}},
    others=(8_767_123_696, 337_740_404),
    example=example,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            text=None,
            returns=("image",),
            ffn={"image": "img_mlp"},
        ),
    ),
)
