"""PixArt-Sigma: blocks of one stream that look at the text, and tabled modulation; a diffusion process."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of the picture; the text is padded."""
    assert not references, "PixArt has no editing models"
    text = call.get("max_sequence_length", 300)
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 1024) // 8, call.get("width", 1024) // 8),
        "encoder_hidden_states": (1, text, config["caption_channels"]),
        "encoder_attention_mask": (1, text),
        "timestep": (1,),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


ADAPTER = Adapter(
    family="pixart",
    transformer="PixArtTransformer2DModel",
    guidance="guidance_scale",
    models={
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": {"caption_channels": 4096, "use_additional_conditions": False},
    },
    dtype="float32",
    others=(4_762_310_656, 83_653_863),
    decoding=1_541,
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
