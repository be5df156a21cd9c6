"""The teacher's parts: a small but genuine FLUX pipeline, with tokenizers made from the captions' vocabulary."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ppcl_toolkit.shapes.scenes import BACKGROUND_PHRASES, CONSONANTS, CONTENTS, PREFIXES, VOWELS

FOLDER = Path(__file__).with_name("teacher")
TEXT_TOKENS = 16  # of both encoders: pass `max_sequence_length=16` to the pipeline
STEPS = 16  # Euler steps of every score in this package
GUIDANCE = 2.5  # embedded, so a step is one forward
WIDTH = 96
LATENT_CHANNELS = 8
LATENT_SIZE = 8
DUAL_BLOCKS, SINGLE_BLOCKS = 8, 16


def vocabulary() -> list[str]:
    """Every word of the grammar but the spelled ones, sorted."""
    texts = [*PREFIXES, *BACKGROUND_PHRASES, *(c for contents in CONTENTS.values() for c in contents)]
    return sorted(set(re.findall(r"\b[a-z]+\b", " ".join(texts))))


def t5_tokenizer() -> T5Tokenizer:
    """Whole words, and single capital letters for the words to be drawn."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -1.0) for word in vocabulary()]
    letters = [(letter, -3.0) for letter in sorted(CONSONANTS + VOWELS)]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=TEXT_TOKENS)


def _clip_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token: a later merge never breaks a word that earlier ones complete."""
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            known = [pair for pair in merges if pair in pairs]
            pair = known[0] if known else pairs[0]
            if not known:
                merges.append(pair)
            at = pairs.index(pair)
            symbols[at : at + 2] = ["".join(pair)]
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding whose merges make each word of the grammar one token; spelled words stay letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = _clip_merges(vocabulary())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    names = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    ids = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=ids, merges=cast(Any, merges), model_max_length=TEXT_TOKENS)


def text_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained CLIP (pooled vector) and T5 (sequence) encoders sized for the grammar."""
    clip_ids, t5_ids = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(clip_ids),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=64,
        bos_token_id=clip_ids.bos_token_id,
        eos_token_id=clip_ids.eos_token_id,
        pad_token_id=clip_ids.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_ids),
        d_model=WIDTH,
        d_kv=24,
        d_ff=384,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_max_distance=TEXT_TOKENS,
        pad_token_id=t5_ids.pad_token_id,
        eos_token_id=t5_ids.eos_token_id,
    )
    encoder = T5EncoderModel(t5)
    _look_at_neighbours(encoder)
    return CLIPTextModel(clip), encoder


@torch.no_grad()
def _look_at_neighbours(encoder: T5EncoderModel) -> None:
    """Start one head of T5 at the word before, one at the word two before, one at the next, one anywhere.

    FLUX gives text tokens no position, so only these distances tell "a red circle and a blue square" from its like.
    """
    bias = encoder.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    after = encoder.config.relative_attention_num_buckets // 2
    bias.zero_()
    for head, bucket in enumerate((1, 2, after + 1)):
        bias[bucket, head] = 6.0


def transformer() -> FluxTransformer2DModel:
    """An untrained transformer, 8 dual and 16 single blocks of width 96; each block starts as the identity."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DUAL_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if name == "proj_out" or re.search(r"norm\w*\.linear$", name):  # adaLN-Zero, Peebles and Xie 2023
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def autoencoder(shift: float = 0.0, scale: float = 1.0) -> AutoencoderKL:
    """An untrained autoencoder: 32x32 RGB to 8 channels of 8x8; latents are (z - shift) * scale."""
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift,
        scaling_factor=scale,
    )


def build(
    vae: AutoencoderKL,
    model: FluxTransformer2DModel,
    encoders: tuple[CLIPTextModel, T5EncoderModel],
) -> FluxPipeline:
    """Join the parts into a pipeline; the time shift is off, as in training."""
    clip, t5 = encoders
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer(),
        transformer=model.eval(),
    )


def save(pipeline: FluxPipeline, folder: Path = FOLDER) -> None:
    """Write `pipeline` in bf16 and put it in place of `folder` at once; other files of the folder are kept."""
    temporary, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.to(torch.bfloat16).save_pretrained(temporary)
    for encoder in ("text_encoder", "text_encoder_2"):
        # Without a dtype, transformers opens a model as its configuration says but diffusers opens in fp32.
        config = temporary / encoder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for kept in folder.glob("*") if folder.exists() else ():
        if kept.is_file() and not (temporary / kept.name).exists():
            shutil.copy2(kept, temporary / kept.name)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path = FOLDER, **options: Any) -> FluxPipeline:
    """Open the teacher, with `from_pretrained`'s `options` (`torch_dtype`, ...), without progress bars."""
    pipeline = FluxPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def size_in_bytes(folder: Path = FOLDER) -> int:
    """Bytes of every file of the teacher."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def training_record(folder: Path = FOLDER) -> dict[str, Any]:
    """The training record that the export wrote beside the pipeline, or an empty one."""
    record = folder / "training.json"
    return json.loads(record.read_text()) if record.exists() else {}
