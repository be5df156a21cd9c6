"""CogVideoX, text to video: dual-stream blocks whose streams share attention and FFN; a diffusion process."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of a frame, and four frames; the text is padded."""
    assert not references, "these make videos of text alone"
    rows, columns = call.get("height", 480) // 8, call.get("width", 720) // 8
    frames = (call.get("num_frames", 49) - 1) // 4 + 1
    found: dict[str, Any] = {
        "hidden_states": (1, frames, config["in_channels"], rows, columns),
        "encoder_hidden_states": (1, call.get("max_sequence_length", 226), config["text_embed_dim"]),
        "timestep": (1,),
    }
    return found


ADAPTER = Adapter(
    family="cogvideox",
    transformer="CogVideoXTransformer3DModel",
    guidance="guidance_scale",
    shared=("image_rotary_emb",),
    models={
        "zai-org/CogVideoX-2b": {},
        "zai-org/CogVideoX-5b": {
            "num_layers": 42,
            "num_attention_heads": 48,
            "use_rotary_positional_embeddings": True,
        },
    },
    others=(4_762_310_656, 215_583_907),
    example=example,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            returns=("image", "text"),
            modulation=("norm1.linear", "norm2.linear"),
        ),
    ),
)
