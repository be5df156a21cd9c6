"""Tiny pipelines that make pictures."""

import parts
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage21,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import ByT5Tokenizer

DUAL_SINGLE = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 3,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}


def ovis_image() -> OvisImagePipeline:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        **DUAL_SINGLE, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 4, 8)
    )
    return parts.finished(
        OvisImagePipeline,
        vae=parts.vae(),
        text_encoder=parts.qwen3_encoder().model,
        tokenizer=parts.chat_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def longcat_image() -> LongCatImagePipeline:
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        **{**DUAL_SINGLE, "in_channels": 64}, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)
    )
    return parts.finished(
        LongCatImagePipeline,
        vae=parts.vae(16),
        text_encoder=parts.qwen_encoder(),
        tokenizer=parts.chat_tokenizer(),
        text_processor=parts.qwen_processor(),
        transformer=parts.randomize(transformer),
    )


def lumina2() -> Lumina2Pipeline:
    """Two refiners, and four blocks."""
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 16, 16),
        cap_feat_dim=16,
    )
    return parts.finished(
        Lumina2Pipeline,
        vae=parts.vae(4),
        text_encoder=parts.qwen3_encoder().model,
        tokenizer=parts.chat_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def cogview4() -> CogView4Pipeline:
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return parts.finished(
        CogView4Pipeline,
        vae=parts.vae(4),
        text_encoder=parts.qwen3_encoder().model,
        tokenizer=parts.chat_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def sana() -> SanaPipeline:
    """By its own solver, of a rectified flow."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    kinds, widths, scales = ("ResBlock", "EfficientViTBlock"), (8, 8), ((), (5,))
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return parts.finished(
        SanaPipeline,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
        vae=vae.eval(),
        text_encoder=parts.qwen3_encoder().model,
        tokenizer=parts.chat_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma: a diffusion process, which learns its variance, too."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=8,
        use_additional_conditions=False,
        caption_channels=32,
    )
    return parts.finished(
        PixArtSigmaPipeline,
        scheduler=DDPMScheduler(),
        vae=parts.vae(4),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
        transformer=parts.randomize(transformer),
    )


def bria() -> BriaPipeline:
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return parts.finished(
        BriaPipeline,
        transformer=parts.randomize(transformer),
        vae=parts.vae(4),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
    )


def hunyuan_image(*, use_meanflow: bool = False) -> HunyuanImagePipeline:
    """Without a guider; what stands in quotes goes through a second text encoder."""
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
        use_meanflow=use_meanflow,
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=2,
        sample_size=16,
    )
    return parts.finished(
        HunyuanImagePipeline,
        vae=vae.eval(),
        text_encoder=parts.qwen_encoder(),
        tokenizer=parts.qwen_tokenizer(),
        text_encoder_2=parts.t5_encoder(400),
        tokenizer_2=ByT5Tokenizer(),
        transformer=parts.randomize(transformer),
    )


def chroma_transformer() -> ChromaTransformer2DModel:
    """What modulates a block is told by its number."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        **DUAL_SINGLE,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return parts.randomize(transformer).requires_grad_(False)


def chroma() -> ChromaPipeline:
    return parts.finished(
        ChromaPipeline,
        vae=parts.vae(),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
        transformer=chroma_transformer(),
    )


def qwen_image21() -> QwenImage21Pipeline:
    """Qwen-Image 2.1: text and pictures in one stream, the noised one last."""
    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        mlp_ratio=2,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    processor = parts.qwen_processor()
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    )
    return parts.finished(
        QwenImage21Pipeline,
        vae=vae.eval(),
        text_encoder=parts.qwen3_vl_encoder(),
        processor=processor,
        transformer=parts.randomize(transformer),
    )


def krea2() -> Krea2Pipeline:
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
    )
    return parts.finished(
        Krea2Pipeline,
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen3_vl_encoder().model,
        tokenizer=parts.qwen_tokenizer(),
        transformer=parts.randomize(transformer),
        text_encoder_select_layers=(1, 2),
    )
