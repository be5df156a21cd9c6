"""Krea 2: text, of several layers of its encoder, and image in one stream; blocks add tables to one modulation."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token for 16 x 16 pixels; texts are padded to their full length, and masked."""
    assert not references, "Krea 2 has no editing models"
    image, text = call.get("height", 1024) * call.get("width", 1024) // 256, call.get("max_sequence_length", 512)
    return {
        "hidden_states": (1, image, config["in_channels"]),
        "encoder_hidden_states": (1, text, config["num_text_layers"], config["text_hidden_dim"]),
        "timestep": (1,),
        "position_ids": (text + image, 3),
        "encoder_attention_mask": (1, text),
    }


ADAPTER = Adapter(
    family="krea2",
    transformer="Krea2Transformer2DModel",
    packs=True,
    shared=("position_ids",),
    guidance="guidance_scale",
    unguided=0.0,
    models={"krea/Krea-2-Raw": {}, "krea/Krea-2-Turbo": {}},
    others=(4_437_815_808, 126_892_531),
    example=example,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            text=None,
            returns=("image",),
            ffn={"image": "ff"},
        ),
    ),
)
