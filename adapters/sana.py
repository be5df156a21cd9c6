"""Sana: blocks of one stream with linear attention that look at the text; tabled modulation, convolutions for FFNs."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are a 32nd of the picture; the text is padded."""
    assert not references, "Sana has no editing models"
    text = call.get("max_sequence_length", 300)
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 1024) // 32, call.get("width", 1024) // 32),
        "encoder_hidden_states": (1, text, config["caption_channels"]),
        "encoder_attention_mask": (1, text),
        "timestep": (1,),
    }


ADAPTER = Adapter(
    family="sana",
    transformer="SanaTransformer2DModel",
    guidance="guidance_scale",
    models={
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": {},
        "Efficient-Large-Model/Sana_600M_1024px_diffusers": {
            "num_layers": 28,
            "num_attention_heads": 36,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
    },
    others=(2_614_341_888, 312_250_275),
    example=example,
    stacks=(
        Stack(path="transformer_blocks", depth_key="num_layers", text=None, returns=("image",), ffn={"image": "ff"}),
    ),
)
