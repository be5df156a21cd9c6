"""Tiny pipelines of the families beside those of `tiny.py`: classes of diffusers, and what they are asked for."""

import parts
import pictures
import torch
import videos
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)


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
    return parts.finished(
        AuraFlowPipeline,
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5_encoder(),
        vae=parts.vae(4),
        transformer=aura_flow_transformer(),
    )


def flux2_pipeline() -> Flux2KleinPipeline:
    """FLUX.2 klein: the run ends with latents that are unpacked and scaled, unlike those that go round."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=1,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_var.fill_(3.0)
    return parts.finished(
        Flux2KleinPipeline,
        vae=vae,
        text_encoder=parts.qwen3_encoder(),
        tokenizer=parts.chat_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def z_image_pipeline() -> ZImagePipeline:
    """Z-Image: latents and texts are lists with a tensor for each sample, and so is what comes out."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    return parts.finished(
        ZImagePipeline,
        vae=parts.vae(4),
        text_encoder=parts.qwen3_encoder(),
        tokenizer=parts.chat_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def wan_pipeline() -> WanPipeline:
    """Wan 2.1: a video."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return parts.finished(
        WanPipeline,
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5_encoder(),
        vae=vae,
        transformer=parts.randomize(transformer),
    )


TINY = {"height": 8, "width": 8, "guidance_scale": 1.0, "max_sequence_length": 16}
SQUARE = {**TINY, "height": 32, "width": 32, "use_resolution_binning": False}
STRANGERS = {
    "aura_flow": (aura_flow_pipeline, TINY),
    "flux2": (flux2_pipeline, {**TINY, "text_encoder_out_layers": (0, 1, 2)}),
    "z_image": (z_image_pipeline, {**TINY, "guidance_scale": 0.0}),
    "wan": (wan_pipeline, {**TINY, "height": 16, "width": 16, "num_frames": 5}),
    "ovis_image": (pictures.ovis_image, {**TINY, "max_sequence_length": 160}),
    "longcat_image": (
        pictures.longcat_image,
        {"height": 8, "width": 8, "guidance_scale": 1.0, "enable_prompt_rewrite": False},
    ),
    "lumina2": (pictures.lumina2, {**TINY, "height": 16, "width": 16, "system_prompt": "x", "max_sequence_length": 40}),
    "cogview4": (pictures.cogview4, {**TINY, "height": 16, "width": 16}),
    "sana": (pictures.sana, SQUARE),
    "pixart": (pictures.pixart, {**SQUARE, "height": 8, "width": 8}),
    "cogvideox": (videos.cogvideox, {**TINY, "height": 16, "width": 16, "num_frames": 9}),
    "ltx_video": (videos.ltx_video, {**TINY, "height": 32, "width": 32, "num_frames": 9}),
    "hunyuan_video": (
        videos.hunyuan_video,
        {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16},
    ),
    "mochi": (videos.mochi, {**TINY, "height": 16, "width": 16, "num_frames": 7}),
    "bria": (pictures.bria, {**TINY, "max_sequence_length": 24}),
    "chroma": (pictures.chroma, TINY),
    "hunyuan_image": (pictures.hunyuan_image, {"height": 8, "width": 8}),
    "krea2": (
        pictures.krea2,
        {"height": 128, "width": 192, "guidance_scale": 0.0, "max_sequence_length": 160},
    ),
    "qwen_image21": (pictures.qwen_image21, {"height": 64, "width": 96, "use_kv_cache": False}),
}
"""By the name of its adapter, how a family's pipeline is made, and what the pipeline is asked for."""
