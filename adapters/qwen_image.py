"""Qwen-Image and its editing models: dual-stream blocks only; reference images sit behind the noised tokens."""

from ppcl_toolkit.adapter import Adapter, Stack

ADAPTER = Adapter(
    family="qwen_image",
    transformer="QwenImageTransformer2DModel",
    packs=True,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            ffn={"image": "img_mlp", "text": "txt_mlp"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
        ),
    ),
)
