"""The teacher's transformer and text encoders, trained together by rectified flow on packed latents.

Shapes: B batch, N tokens (16 of the image, 16 of the text), D features.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast, final

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from ppcl_toolkit.artifacts.storage import load_tree
from ppcl_toolkit.shapes.progress import log, save_atomically
from ppcl_toolkit.shapes.scenes import Image, render, sample
from ppcl_toolkit.shapes.teacher import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    STEPS,
    TEXT_TOKENS,
    clip_tokenizer,
    t5_tokenizer,
    text_encoders,
    transformer,
)
from ppcl_toolkit.shapes.vae import to_images, to_latents, to_pixels, to_tensor

SHARD = 16384  # scenes in one file of the pool
NOISE_MEAN, NOISE_SPREAD = 1.2, 1.2  # of the logit of sigma: what a caption decides is decided in high noise
GRID = LATENT_SIZE // 2


class Batch(NamedTuple):
    """Packed latents (B, 16, 32) and the token ids (B, 16) of both tokenizers."""

    latents: Tensor
    t5_ids: Tensor
    clip_ids: Tensor


def tokenize(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of T5 and of CLIP, padded as the pipeline pads them; each (B, 16) uint8."""
    ids = [
        tokenizer(list(captions), padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
        for tokenizer in (t5_tokenizer(), clip_tokenizer())
    ]
    return ids[0].to(torch.uint8), ids[1].to(torch.uint8)


def pack(latents: Tensor) -> Tensor:
    """(B, 8, 8, 8) to (B, 16, 32), as the pipeline does."""
    batch, channels, height, width = latents.shape
    return cast(Tensor, FluxPipeline._pack_latents(latents, batch, channels, height, width))


@torch.no_grad()
def encode_pool(run: Path, vae: AutoencoderKL, *, shards: int) -> None:
    """Render and encode `shards` files of captioned scenes into `run`/pool; files already there are kept."""
    for index in range(shards):
        path = run / "pool" / f"{index:04d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng((7, index))
        captions, latents = [], []
        for _ in range(SHARD // 256):
            pairs = [sample(rng) for _ in range(256)]
            captions += [caption for caption, _ in pairs]
            pixels = to_tensor([render(scene, rng) for _, scene in pairs]).to(vae.device)
            latents.append(pack(to_latents(vae, pixels)).bfloat16().cpu())
        t5_ids, clip_ids = tokenize(captions)
        save_atomically({"latents": torch.cat(latents), "t5_ids": t5_ids, "clip_ids": clip_ids}, path)
        log.info("pool: %d of %d files", index + 1, shards)


@final
class Pool:
    """The encoded scenes; `refresh` picks up files that were added since."""

    def __init__(self, run: Path, device: torch.device) -> None:
        """Open every file of `run`/pool; its scenes are moved to `device` batch by batch."""
        self.folder, self.device = run / "pool", device
        self.shards: dict[str, Batch] = {}
        self.refresh()

    def refresh(self) -> None:
        """Open files that were added since the last call."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.shards:
                self.shards[path.name] = Batch(**load_tree(path))
        if not self.shards:
            raise FileNotFoundError(f"no encoded scenes in {self.folder}: run the phase 'pool' first")

    def draw(self, size: int, rng: np.random.Generator) -> Batch:
        """`size` scenes at random from one random file."""
        names = sorted(self.shards)
        shard = self.shards[names[rng.integers(len(names))]]
        rows = torch.from_numpy(rng.integers(len(shard.latents), size=size))
        return Batch(
            shard.latents[rows].float().to(self.device),
            shard.t5_ids[rows].long().to(self.device),
            shard.clip_ids[rows].long().to(self.device),
        )


@final
class TextToLatent(nn.Module):
    """Both text encoders and the transformer, called as the FLUX pipeline calls them."""

    image_ids: Tensor
    text_ids: Tensor

    def __init__(self) -> None:
        """Start untrained."""
        super().__init__()
        self.clip, self.t5 = text_encoders()
        self.transformer = transformer()
        ids = FluxPipeline._prepare_latent_image_ids(1, GRID, GRID, "cpu", torch.float32)
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TEXT_TOKENS, 3), persistent=False)

    def text(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sequence (B, 16, D) of T5 and pooled vector (B, D) of CLIP."""
        return self.t5(input_ids=t5_ids)[0], self.clip(input_ids=clip_ids).pooler_output

    def velocity(self, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor) -> Tensor:
        """Predicted noise minus latents (B, 16, 32), at `sigma` (B,) with embedded `guidance` (B,)."""
        answer = self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )
        return cast(Tensor, answer[0])


def put_weights(model: TextToLatent, weights: dict[str, Tensor]) -> None:
    """Load `weights` as `named_parameters` names them: a tied one is given once."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"t5.encoder.embed_tokens.weight"}, (missing, unexpected)


@contextlib.contextmanager
def dropped_blocks(model: nn.Module, rng: np.random.Generator, probability: float) -> Iterator[None]:
    """Leave each block of `model` out with `probability`, for the whole batch (LayerDrop, Fan et al. 2019)."""
    stacks = {name: getattr(model, name) for name in ("transformer_blocks", "single_transformer_blocks")}
    for name, blocks in stacks.items():
        kept = [block for block in blocks if rng.random() >= probability]
        setattr(model, name, nn.ModuleList(kept))
    try:
        yield
    finally:
        for name, blocks in stacks.items():
            setattr(model, name, blocks)


def noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, sigma (B,) from a logit-normal, and the velocity to predict."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    logits = torch.randn(len(latents), generator=generator, device=latents.device)
    sigma = torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * logits)
    blend = sigma[:, None, None]
    return (1 - blend) * latents + blend * noise, sigma, noise - latents


@torch.no_grad()
def generate(
    model: TextToLatent,
    vae: AutoencoderKL,
    captions: Sequence[str],
    *,
    guidance: float,
    embedded: bool,
    seed: int = 0,
) -> list[Image]:
    """Pictures by 16 Euler steps; guidance `embedded` in one forward, or classifier-free in two."""
    device = model.image_ids.device
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), GRID**2, 4 * LATENT_CHANNELS, generator=noise).to(device)
    text, empty = (
        model.text(*(ids.long().to(device) for ids in tokenize(texts))) for texts in (captions, [""] * len(captions))
    )
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        sigma = now.expand(len(x)).to(device)
        strength = torch.full((len(x),), guidance if embedded else 1.0, device=device)
        v = model.velocity(x, sigma, text, strength)
        if not embedded:
            without = model.velocity(x, sigma, empty, strength)
            v = without + guidance * (v - without)
        x = x + (then - now).to(device) * v
    side = 4 * LATENT_SIZE
    return to_images(to_pixels(vae, FluxPipeline._unpack_latents(x, side, side, 4)))
