"""FLUX.2: dual-stream blocks, then many that run both streams as one; all blocks of a stack share one modulation.

The same class serves -dev and -klein; reference tokens sit behind the noised ones.
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token is 16x16 pixels, the text is padded, and every sample has positions of its own."""
    image = call.get("height", 1024) // 16 * (call.get("width", 1024) // 16) * (1 + references)
    text = call.get("max_sequence_length", 512)
    shapes: dict[str, Any] = {
        "hidden_states": (1, image, config["in_channels"]),
        "encoder_hidden_states": (1, text, config["joint_attention_dim"]),
        "timestep": (1,),
        "img_ids": (1, image, 4),
        "txt_ids": (1, text, 4),
    }
    return shapes | ({"guidance": (1,)} if config["guidance_embeds"] else {})


def noised(call: Mapping[str, Any]) -> int:
    """Count the tokens of the image that is made: the first number of a position is the image it belongs to."""
    return int((call["img_ids"][0, :, 0] == 0).sum())


SMALL = ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B")
LARGE = ("black-forest-labs/FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-base-9B")
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False}

ADAPTER = Adapter(
    family="flux2",
    transformer="Flux2Transformer2DModel",
    guidance="guidance_scale",
    models={
        **dict.fromkeys(SMALL, KLEIN_4B),
        **dict.fromkeys(LARGE, KLEIN_9B),
        "black-forest-labs/FLUX.2-dev": {},
    },
    others={
        **dict.fromkeys(SMALL, (4_022_468_096, 84_046_115)),
        **dict.fromkeys(LARGE, (8_190_735_360, 84_046_115)),
        "black-forest-labs/FLUX.2-dev": (24_011_361_280, 84_046_115),
    },
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
        ),
        Stack(path="single_transformer_blocks", depth_key="num_single_layers", text=None, returns=("image",)),
    ),
)
