"""Tiny pipelines of the families beside those of `tiny.py`: classes of diffusers, and what they are asked for."""

import parts
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM


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


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = parts.qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    return tokenizer


def qwen3_encoder() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256 + len(parts.QWEN_TOKENS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=256,
        eos_token_id=258,
    )
    return Qwen3ForCausalLM(config).eval()


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
    return finished(
        Flux2KleinPipeline,
        vae=vae,
        text_encoder=qwen3_encoder(),
        tokenizer=chat_tokenizer(),
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
    return finished(
        ZImagePipeline,
        vae=parts.vae(4),
        text_encoder=qwen3_encoder(),
        tokenizer=chat_tokenizer(),
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
    return finished(
        WanPipeline,
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5_encoder(),
        vae=vae,
        transformer=parts.randomize(transformer),
    )


TINY = {"height": 8, "width": 8, "guidance_scale": 1.0}
STRANGERS = {
    "aura_flow": (aura_flow_pipeline, TINY),
    "flux2": (flux2_pipeline, {**TINY, "text_encoder_out_layers": (0, 1, 2)}),
    "z_image": (z_image_pipeline, {**TINY, "guidance_scale": 0.0}),
    "wan": (wan_pipeline, {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0}),
}
"""By the name of its adapter, how a family's pipeline is made, and what the pipeline is asked for."""
