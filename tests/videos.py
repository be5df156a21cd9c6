"""Tiny pipelines that make videos."""

import parts
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)


def cogvideox() -> CogVideoXPipeline:
    """A diffusion process by velocities; positions are rotated as in the 5B model."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return parts.finished(
        CogVideoXPipeline,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"),
        vae=vae.eval(),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def ltx_video() -> LTXPipeline:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=32,
    )
    widths, layers, scaled = (8, 8, 8, 8), (1, 1, 1, 1, 1), (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=layers,
        decoder_layers_per_block=layers,
        spatio_temporal_scaling=scaled,
        decoder_spatio_temporal_scaling=scaled,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    return parts.finished(
        LTXPipeline,
        vae=vae.eval(),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=3,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return parts.finished(
        HunyuanVideoPipeline,
        vae=vae.eval(),
        text_encoder=parts.qwen3_encoder().model,
        tokenizer=parts.chat_tokenizer(),
        text_encoder_2=parts.clip_encoder(),
        tokenizer_2=parts.clip_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def mochi() -> MochiPipeline:
    """Its scheduler counts what is left of the picture, not the noise; the last block only reads the text."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=24,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    widths = (32, 32, 32, 32)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=(1,) * 5
    )
    return parts.finished(
        MochiPipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
        transformer=parts.randomize(transformer),
    )
