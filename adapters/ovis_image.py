"""Ovis-Image: dual-stream blocks, then single-stream blocks that still take and return two streams."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token is 16x16 pixels, the text is padded."""
    assert not references, "Ovis-Image has no editing models"
    image = call.get("height", 1024) // 16 * (call.get("width", 1024) // 16)
    text = call.get("max_sequence_length", 256)
    return {
        "hidden_states": (1, image, config["in_channels"]),
        "encoder_hidden_states": (1, text, config["joint_attention_dim"]),
        "timestep": (1,),
        "img_ids": (image, 3),
        "txt_ids": (text, 3),
    }


ADAPTER = Adapter(
    family="ovis_image",
    transformer="OvisImageTransformer2DModel",
    packs=True,
    shared=("img_ids", "txt_ids"),
    guidance="guidance_scale",
    models={"AIDC-AI/Ovis-Image-7B": {}},
    others=(1_720_574_976, 83_819_683),
    decoding=1_541,
    example=example,
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
