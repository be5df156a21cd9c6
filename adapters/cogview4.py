"""CogView4: dual-stream blocks whose streams share attention and FFN: neither can go for the text alone."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of the picture; a prompt is rarely longer than 128 tokens."""
    assert not references, "CogView4 has no editing models"
    text = min(call.get("max_sequence_length", 128), 128)
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 1024) // 8, call.get("width", 1024) // 8),
        "encoder_hidden_states": (1, text, config["text_embed_dim"]),
        "timestep": (1,),
        **dict.fromkeys(("original_size", "target_size", "crop_coords"), (1, 2)),
    }


ADAPTER = Adapter(
    family="cogview4",
    transformer="CogView4Transformer2DModel",
    guidance="guidance_scale",
    models={"zai-org/CogView4-6B": {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}},
    others=(8_779_194_368, 83_819_683),
    decoding=1_541,
    example=example,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            returns=("image", "text"),
            modulation=("norm1.linear",),
        ),
    ),
)
