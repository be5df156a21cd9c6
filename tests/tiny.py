"""Tiny random pipelines made of the real classes, offline: the models of every test."""

import functools

import parts
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from parts import randomize


def flux_transformer(dual: int = 4, single: int = 3) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=dual,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return randomize(transformer)


def flux_inputs(batch: int = 2, image_tokens: int = 9, text_tokens: int = 5, seed: int = 0) -> dict:
    """Keyword arguments of one call of `flux_transformer`."""
    g = torch.Generator().manual_seed(seed)
    side = int(image_tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return {
        "hidden_states": torch.randn(batch, side * side, 4, generator=g),
        "encoder_hidden_states": torch.randn(batch, text_tokens, 32, generator=g),
        "pooled_projections": torch.randn(batch, 32, generator=g),
        "timestep": torch.rand(batch, generator=g),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text_tokens, 3),
        "return_dict": False,
    }


def sd3_transformer(layers: int = 4) -> SD3Transformer2DModel:
    """SD3.5: the first and the third block have a second attention, the last one returns no text."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 2),
        qk_norm="rms_norm",
    )
    return randomize(transformer)


def sd3_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 6, 6, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "pooled_projections": torch.randn(2, 32, generator=g),
        "timestep": torch.tensor([300.0, 700.0]),
        "return_dict": False,
    }


def qwen_image_transformer(layers: int = 4, *, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        zero_cond_t=zero_cond_t,
    )
    return randomize(transformer)


def qwen_image_inputs(references: int = 0) -> dict:
    """Keyword arguments of one call; `references` counts the images of 2 x 2 tokens behind the noised ones."""
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 9 + 4 * references, 4, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_shapes": [[(1, 3, 3), *[(1, 2, 2)] * references]] * 2,
        "return_dict": False,
    }


def flux_pipeline(dual: int = 4, single: int = 3) -> FluxPipeline:
    return _finished(FluxPipeline, **_flux_parts(dual, single))


def flux_kontext_pipeline() -> FluxKontextPipeline:
    return _finished(FluxKontextPipeline, **_flux_parts(4, 3))


def _flux_parts(dual: int, single: int) -> dict:
    return {
        "text_encoder": parts.clip_encoder(),
        "text_encoder_2": parts.t5_encoder(),
        "tokenizer": parts.clip_tokenizer(),
        "tokenizer_2": parts.t5_tokenizer(),
        "transformer": flux_transformer(dual, single),
        "vae": parts.vae(),
    }


def sd3_pipeline(layers: int = 4) -> StableDiffusion3Pipeline:
    return _finished(
        StableDiffusion3Pipeline,
        text_encoder=parts.clip_encoder(16, projects=True),
        text_encoder_2=parts.clip_encoder(16, projects=True),
        text_encoder_3=parts.t5_encoder(),
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(),
        tokenizer_3=parts.t5_tokenizer(),
        transformer=sd3_transformer(layers),
        vae=parts.vae(4),
    )


def qwen_image_pipeline(layers: int = 4) -> QwenImagePipeline:
    return _finished(QwenImagePipeline, **_qwen_image_parts(layers))


def qwen_image_edit_pipeline() -> QwenImageEditPipeline:
    return _finished(QwenImageEditPipeline, **_qwen_image_parts(), processor=parts.qwen_processor())


def qwen_image_edit_plus_pipeline(*, zero_cond_t: bool = False) -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-2509; with `zero_cond_t` 2511, whose reference tokens are modulated as if nothing was noised."""
    made = _qwen_image_parts(zero_cond_t=zero_cond_t)
    return _finished(QwenImageEditPlusPipeline, **made, processor=parts.qwen_processor())


def _qwen_image_parts(layers: int = 4, *, zero_cond_t: bool = False) -> dict:
    return {
        "text_encoder": parts.qwen_encoder(),
        "tokenizer": parts.qwen_tokenizer(),
        "transformer": qwen_image_transformer(layers, zero_cond_t=zero_cond_t),
        "vae": parts.qwen_vae(),
    }


def _finished(pipeline: type, **modules):
    made = pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **modules)
    made.set_progress_bar_config(disable=True)
    return made


def small_edits(patch=setattr) -> None:
    """Let the editing pipelines of Qwen-Image bring images to a sixteenth of a million pixels; `patch` sets it."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        if not isinstance(module.calculate_dimensions, functools.partial):  # once is enough
            patch(module, "calculate_dimensions", functools.partial(_small_dimensions, module.calculate_dimensions))


def _small_dimensions(own, area, ratio):
    return own(area // 16, ratio)
