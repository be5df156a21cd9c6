"""HunyuanVideo, text to video: dual-stream blocks, then single-stream blocks that still take and return two streams."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of a frame, and four frames; the text is padded."""
    assert not references, "these make videos of text alone"
    rows, columns = call.get("height", 720) // 8, call.get("width", 1280) // 8
    frames = (call.get("num_frames", 129) - 1) // 4 + 1
    text = call.get("max_sequence_length", 256)
    shapes: dict[str, Any] = {
        "hidden_states": (1, config["in_channels"], frames, rows, columns),
        "timestep": (1,),
        "encoder_hidden_states": (1, text, config["text_embed_dim"]),
        "encoder_attention_mask": (1, text),
        "pooled_projections": (1, config["pooled_projection_dim"]),
    }
    return shapes | ({"guidance": (1,)} if config["guidance_embeds"] else {})


ADAPTER = Adapter(
    family="hunyuan_video",
    transformer="HunyuanVideoTransformer3DModel",
    models={"hunyuanvideo-community/HunyuanVideo": {}},
    others=(7_504_924_672, 123_060_480, 246_478_803),
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
