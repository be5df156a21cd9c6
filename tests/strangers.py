"""Families that the toolkit does not ship, tiny: classes of diffusers, with adapters as a user would write them."""

import parts
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from ppcl_toolkit.adapter import Adapter, Stack

AURA_FLOW = Adapter(
    family="aura_flow",
    transformer="AuraFlowTransformer2DModel",
    guidance="guidance_scale",
    stacks=(
        Stack(
            path="joint_transformer_blocks",
            depth_key="num_mmdit_layers",
            ffn={"image": "ff", "text": "ff_context"},
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


def finished(kind: type, **modules):
    """A pipeline with the scheduler of rectified flow, if no other is given, and without bars."""
    made = kind(**{"scheduler": FlowMatchEulerDiscreteScheduler(), **modules})
    made.set_progress_bar_config(disable=True)
    made.transformer.requires_grad_(False)
    return made


def aura_flow_transformer(joint: int = 3, single: int = 2) -> AuraFlowTransformer2DModel:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=joint,
        num_single_dit_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return parts.randomize(transformer)


def aura_flow_pipeline() -> AuraFlowPipeline:
    return finished(
        AuraFlowPipeline,
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5_encoder(),
        vae=parts.vae(4),
        transformer=aura_flow_transformer(),
    )
