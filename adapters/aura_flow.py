"""AuraFlow: a few dual-stream blocks, then many that run both streams as one."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of the picture; the text is padded."""
    assert not references, "AuraFlow has no editing models"
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 1024) // 8, call.get("width", 1024) // 8),
        "encoder_hidden_states": (1, call.get("max_sequence_length", 256), config["joint_attention_dim"]),
        "timestep": (1,),
    }


ADAPTER = Adapter(
    family="aura_flow",
    transformer="AuraFlowTransformer2DModel",
    guidance="guidance_scale",
    models={"fal/AuraFlow-v0.3": {"pos_embed_max_size": 9216}},
    dtype="float32",
    others=(1_223_550_976, 83_653_863),
    decoding=1_541,
    example=example,
    stacks=(
        # No `ffn`: it is added to what enters the block, and a linear map in its place would delete the attention.
        Stack(
            path="joint_transformer_blocks",
            depth_key="num_mmdit_layers",
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
            modulation=("norm1.linear", "norm1_context.linear"),
        ),
        Stack(
            path="single_transformer_blocks",
            depth_key="num_single_dit_layers",
            text=None,
            returns=("image",),
            modulation=("norm1.linear",),
        ),
    ),
)
