"""Lumina-Image 2.0: two refiners side by side, which stay, then blocks of one stream."""

from collections.abc import Mapping
from typing import Any

import torch

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of the picture; the text is as long as its mask says, at most 256."""
    assert not references, "Lumina-Image has no editing models"
    text = call.get("max_sequence_length", 256)
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 1024) // 8, call.get("width", 1024) // 8),
        "timestep": (1,),
        "encoder_hidden_states": (1, text, config["cap_feat_dim"]),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
    }


ADAPTER = Adapter(
    family="lumina2",
    transformer="Lumina2Transformer2DModel",
    guidance="guidance_scale",
    models={"Alpha-VLLM/Lumina-Image-2.0": {"cap_feat_dim": 2304}},
    others=(2_614_341_888, 83_819_683),
    decoding=1_541,
    example=example,
    stacks=(
        Stack(
            path="layers",
            depth_key="num_layers",
            text=None,
            returns=("image",),
            ffn={"image": "feed_forward"},
            modulation=("norm1.linear",),
        ),
    ),
)
