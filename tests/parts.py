"""The parts of tiny pipelines around the transformer: real tokenizers, text encoders and autoencoders, made in code."""

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that matters: zero gates would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            offset = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
            parameter.copy_(offset + 0.3 * scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def byte_characters() -> list[str]:
    """The 256 characters by which byte-level BPE spells bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + n for n in range(256 - len(printable))]
    return [chr(code) for code in printable + others]


def clip_tokenizer() -> CLIPTokenizer:
    characters = byte_characters()
    names = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)


def clip_encoder(width: int = 32, *, projects: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=1,
        vocab_size=1000,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(chr(c), -3.0) for c in range(33, 127)], extra_ids=0, model_max_length=64)


def t5_encoder(vocabulary: int = 200) -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    ).eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    names = [*byte_characters(), *QWEN_TOKENS]
    special = {"image_token": "<|image_pad|>", **{name.strip("<|>"): name for name in QWEN_TOKENS[1:]}}
    return Qwen2Tokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], extra_special_tokens=special)


def qwen_processor() -> PaddleOCRVLProcessor:
    """Of the processors for Qwen's vision encoder, the one without videos: those need torchvision."""
    return PaddleOCRVLProcessor(Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56), qwen_tokenizer())


def qwen_encoder() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    number = {name: 256 + i for i, name in enumerate(QWEN_TOKENS)}
    text = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 256 + len(QWEN_TOKENS),
        "bos_token_id": number["<|endoftext|>"],
        "eos_token_id": number["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
        "patch_size": 14,
        "window_size": 56,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def vae(channels: int = 1) -> AutoencoderKL:
    """As many latent pixels as pixels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def qwen_vae() -> AutoencoderKLQwenImage:
    """One latent pixel for 32 x 32: editing pipelines bring what they edit to a million pixels."""
    torch.manual_seed(0)
    made = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=1,
        dim_mult=[1] * 6,
        num_res_blocks=1,
        temperal_downsample=[False] * 5,
        latents_mean=[0.3],
        latents_std=[1.7],
    )
    with torch.no_grad():
        made.quant_conv.weight *= 20  # Untrained, it makes nearly the same of every image.
    return made.eval()


def finished(kind: type, **modules):
    """A pipeline with the scheduler of rectified flow, if no other is given, and without bars."""
    made = kind(**{"scheduler": FlowMatchEulerDiscreteScheduler(), **modules})
    made.set_progress_bar_config(disable=True)
    made.transformer.requires_grad_(False)
    return made


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    return tokenizer


def qwen3_encoder() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256 + len(QWEN_TOKENS),
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


def qwen3_vl_encoder() -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    number = {name: 256 + i for i, name in enumerate(QWEN_TOKENS)}
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 256 + len(QWEN_TOKENS),
        "bos_token_id": number["<|endoftext|>"],
        "eos_token_id": number["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    return Qwen3VLForConditionalGeneration(config).eval()
