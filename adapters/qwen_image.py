"""Qwen-Image and its editing models: dual-stream blocks only; reference images sit behind the noised tokens."""

import math
from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token is 16x16 pixels; a prompt is rarely longer than the 128 tokens assumed here."""
    rows, columns = call.get("height", 1024) // 16, call.get("width", 1024) // 16
    images = [(1, rows, columns)] * (1 + references)
    return {
        "hidden_states": (1, len(images) * rows * columns, config["in_channels"]),
        "encoder_hidden_states": (1, min(call.get("max_sequence_length", 128), 128), config["joint_attention_dim"]),
        "timestep": (1,),
        "img_shapes": [images],
    }


def noised(call: Mapping[str, Any]) -> int:
    """Count the tokens of the image that is made: its (frames, height, width) come before those of references."""
    return math.prod(call["img_shapes"][0][0])


ADAPTER = Adapter(
    family="qwen_image",
    transformer="QwenImageTransformer2DModel",
    packs=True,
    models={
        "Qwen/Qwen-Image": {},
        "Qwen/Qwen-Image-Edit": {},
        "Qwen/Qwen-Image-Edit-2509": {},
        "Qwen/Qwen-Image-Edit-2511": {"zero_cond_t": True},
    },
    others=(8_292_166_656, 126_892_531),
    example=example,
    noised=noised,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            ffn={"image": "img_mlp", "text": "txt_mlp"},
            joint_attention="attn",
            text_mask="encoder_hidden_states_mask",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
            modulation=("img_mod.1", "txt_mod.1"),
        ),
    ),
)
