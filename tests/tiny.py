"""Tiny random pipelines made of the real classes, offline: the models of every test."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer


def byte_characters() -> list[str]:
    """The 256 characters by which byte-level BPE spells bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + n for n in range(256 - len(printable))]
    return [chr(code) for code in printable + others]


def clip_tokenizer() -> CLIPTokenizer:
    characters = byte_characters()
    names = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(chr(c), -3.0) for c in range(33, 127)], extra_ids=0, model_max_length=64)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that matters: zero gates would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            offset = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
            parameter.copy_(offset + 0.3 * scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


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


def flux_pipeline(dual: int = 4, single: int = 3) -> FluxPipeline:
    transformer = flux_transformer(dual, single)
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=1,
        vocab_size=1000,
        projection_dim=32,
    )
    t5 = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    vae = AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModel(clip).eval(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        vae=vae.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
