"""The teacher's autoencoder: trained on fresh scenes, then measured so that its latents have unit variance."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from ppcl_toolkit.shapes.progress import (
    append_line,
    load_if_there,
    log,
    save_atomically,
    warmup_stable_decay,
)
from ppcl_toolkit.shapes.scenes import Image, evaluation_prompts, render, sample, scene_of
from ppcl_toolkit.shapes.score import score_by_category
from ppcl_toolkit.shapes.teacher import autoencoder

KL_WEIGHT = 1e-4
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.15  # at most, against unit variance, under which the refined decoder stays sharp
TEXT_SHARE = 0.35  # of the scenes, more than the flow sees: thin strokes are the hard part


def to_tensor(images: list[Image]) -> Tensor:
    """uint8 pictures as (B, 3, 32, 32) float in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image]:
    """(B, 3, 32, 32) in [-1, 1] as uint8 pictures."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return list(scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(B, 3, 32, 32) pixels as (B, 8, 8, 8) latents of about unit variance: the mode, not a draw."""
    mode: Tensor = vae.encode(pixels).latent_dist.mode()
    return (mode - vae.config["shift_factor"]) * vae.config["scaling_factor"]


def to_pixels(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The inverse of `to_latents`, as the pipeline decodes."""
    pixels: Tensor = vae.decode(latents / vae.config["scaling_factor"] + vae.config["shift_factor"]).sample
    return pixels


def _loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return functional.l1_loss(restored, pixels) + functional.mse_loss(restored, pixels) + KL_WEIGHT * kl


def _scenes(seed: tuple[int, int], count: int) -> list[Image]:
    rng = np.random.default_rng(seed)
    kinds = ["text" if share < TEXT_SHARE else None for share in rng.random(count)]
    return [render(sample(rng, kind)[1], rng) for kind in kinds]


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, factor: float) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = LEARNING_RATE * factor
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


@torch.no_grad()
def restored_score(vae: AutoencoderKL, per_category: int = 30) -> dict[str, float]:
    """Score of ground-truth renders of held-out captions after one pass through the autoencoder."""
    rng = np.random.default_rng(1)
    captions = evaluation_prompts(per_category, seed=1)
    pixels = to_tensor([render(scene_of(caption, rng), rng) for caption in captions]).to(vae.device)
    return score_by_category(captions, to_images(to_pixels(vae, to_latents(vae, pixels))))


@torch.no_grad()
def _measure(vae: AutoencoderKL, scenes: int = 2048) -> tuple[float, float]:
    rng = np.random.default_rng(2)
    latents = []
    for _ in range(scenes // 128):
        pixels = to_tensor([render(sample(rng)[1], rng) for _ in range(128)]).to(vae.device)
        latents.append(vae.encode(pixels).latent_dist.mode())
    every = torch.cat(latents)
    return float(every.mean()), float(1 / every.std())


def train(run: Path, device: torch.device, *, samples: int, batch: int = 64, save_every: int = 200) -> None:
    """Train into `run`/vae.safetensors, resuming there; the finished file holds weights, shift and scale."""
    path = run / "vae.safetensors"
    torch.manual_seed(0)
    vae = _on(autoencoder(), device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    step, state = 0, load_if_there(path)
    if state:
        if state["finished"]:
            return
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    start, first = time.monotonic(), step
    while step * batch < samples:
        loss = _loss(vae, to_tensor(_scenes((3, step), batch)).to(device))
        _descend(optimizer, loss, warmup_stable_decay(step * batch, samples, decay=0.5))
        step += 1
        if step % save_every == 0:
            rate = (step - first) * batch / (time.monotonic() - start)
            row = {"samples": step * batch, "loss": round(loss.item(), 4), "per_second": round(rate)}
            append_line(run / "vae.jsonl", row | {"score": round(restored_score(vae)["overall"], 3)})
            save_atomically(
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "finished": False,
                },
                path,
            )
    shift, scale = _measure(vae)
    final = {"model": vae.state_dict(), "shift": shift, "scale": scale, "step": step, "finished": True}
    save_atomically(final, path)
    log.info("autoencoder: shift %.3f, scale %.3f, score of restored scenes %s", shift, scale, restored_score(vae))


def refine(run: Path, device: torch.device, *, samples: int, batch: int = 64, save_every: int = 200) -> None:
    """Train the decoder on, from noisy latents of the encoder as it is: latents of the flow stay valid.

    The checkpoint is `run`/decoder.safetensors; `load` takes the decoder from there.
    """
    path = run / "decoder.safetensors"
    torch.manual_seed(1)
    vae = load(run, device)
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    state = load_if_there(path)
    step = state["step"] if state else 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
    while step * batch < samples:
        pixels = to_tensor(_scenes((6, step), batch)).to(device)
        with torch.no_grad():
            latents = to_latents(vae, pixels)
            noise = torch.randn_like(latents) * torch.rand(batch, 1, 1, 1, device=device) * LATENT_NOISE
        restored = to_pixels(vae, latents + noise)
        loss = functional.l1_loss(restored, pixels) + functional.mse_loss(restored, pixels)
        _descend(optimizer, loss, warmup_stable_decay(step * batch, samples, decay=0.6))
        step += 1
        if step % save_every == 0 or step * batch >= samples:
            row = {"decoder_samples": step * batch, "loss": round(loss.item(), 4)}
            append_line(run / "vae.jsonl", row | {"score": round(restored_score(vae)["overall"], 3)})
            save_atomically(
                {"model": vae.decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path
            )


def _on(vae: AutoencoderKL, device: torch.device) -> AutoencoderKL:
    nn.Module.to(vae, device)
    return vae


def load(run: Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """The finished autoencoder of `run`, frozen, with its refined decoder if there is one."""
    state = load_if_there(run / "vae.safetensors")
    if not state or not state["finished"]:
        raise FileNotFoundError(f"no finished autoencoder in {run}: run the phase 'vae' first")
    vae = autoencoder(state["shift"], state["scale"])
    vae.load_state_dict(state["model"])
    refined = load_if_there(run / "decoder.safetensors")
    if refined:
        vae.decoder.load_state_dict(refined["model"])
    return _on(vae.eval().requires_grad_(False), torch.device(device))
