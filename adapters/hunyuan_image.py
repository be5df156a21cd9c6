"""HunyuanImage 2.1: dual-stream blocks, then single-stream blocks that still take and return two streams.

Not the distilled model: it is told the next level of noise, too, and that is not known of one step alone.
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are a 32nd of the picture; texts are padded, and so is what is to be written on it.

    How these two are put together depends on their masks: here they are one text.
    """
    assert not references, "HunyuanImage 2.1 has no editing models"
    text = 1000 + 128
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 2048) // 32, call.get("width", 2048) // 32),
        "timestep": (1,),
        "encoder_hidden_states": (1, text, config["text_embed_dim"]),
        "encoder_attention_mask": (1, text),
    }


ADAPTER = Adapter(
    family="hunyuan_image",
    transformer="HunyuanImageTransformer2DModel",
    models={"hunyuanvideo-community/HunyuanImage-2.1-Diffusers": {"text_embed_2_dim": 1472}},
    others=(8_292_166_656, 405_575_491),
    example=example,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            returns=("image", "text"),
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
            modulation=("norm1.linear", "norm1_context.linear"),
        ),
        Stack(
            path="single_transformer_blocks",
            depth_key="num_single_layers",
            returns=("image", "text"),
            modulation=("norm.linear",),
        ),
    ),
)
