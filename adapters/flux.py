"""FLUX.1: dual-stream blocks, then single-stream blocks that still take and return two streams.

The same class serves -dev, -schnell, Lite (fewer dual blocks) and Kontext (reference tokens behind the noised ones).
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token is 16x16 pixels, the text is padded."""
    image = call.get("height", 1024) // 16 * (call.get("width", 1024) // 16) * (1 + references)
    text = call.get("max_sequence_length", 512)
    shapes: dict[str, Any] = {
        "hidden_states": (1, image, config["in_channels"]),
        "encoder_hidden_states": (1, text, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
        "timestep": (1,),
        "img_ids": (image, 3),
        "txt_ids": (text, 3),
    }
    return shapes | ({"guidance": (1,)} if config["guidance_embeds"] else {})


def noised(call: Mapping[str, Any]) -> int:
    """Count the tokens of the image that is made: the first number of a position is the image it belongs to."""
    return int((call["img_ids"][..., 0] == 0).sum())


ADAPTER = Adapter(
    family="flux",
    transformer="FluxTransformer2DModel",
    packs=True,
    shared=("img_ids", "txt_ids"),
    models={
        "black-forest-labs/FLUX.1-dev": {"guidance_embeds": True},
        "black-forest-labs/FLUX.1-Kontext-dev": {"guidance_embeds": True},
        "black-forest-labs/FLUX.1-schnell": {},
        "Freepik/flux.1-lite-8B": {"guidance_embeds": True, "num_layers": 8},
    },
    others=(4_762_310_656, 123_060_480, 83_819_683),
    decoding=1_541,
    example=example,
    noised=noised,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
            modulation=("norm1.linear", "norm1_context.linear"),
        ),
        Stack(path="single_transformer_blocks", depth_key="num_single_layers", modulation=("norm.linear",)),
    ),
)
