"""FLUX.1: dual-stream blocks, then single-stream blocks that still take and return two streams."""

from ppcl_toolkit.adapter import Adapter, Stack

ADAPTER = Adapter(
    family="flux",
    transformer="FluxTransformer2DModel",
    packs=True,
    shared=("img_ids", "txt_ids"),
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
        ),
        Stack(path="single_transformer_blocks", depth_key="num_single_layers"),
    ),
)
