"""The training loop of the phases flow and guidance: time-boxed, resumable, averaged, on one process or several."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image as PillowImage
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppcl_toolkit.shapes.flow import Batch, Pool, TextToLatent, put_weights
from ppcl_toolkit.shapes.muon import Muon
from ppcl_toolkit.shapes.progress import append_line, load_if_there, save_atomically, warmup_stable_decay
from ppcl_toolkit.shapes.scenes import Image
from ppcl_toolkit.shapes.score import score_by_category

Loss = Callable[[Batch, np.random.Generator, torch.Generator], Tensor]
Look = Callable[[TextToLatent], tuple[list[str], list[Image]]]


@dataclass(frozen=True)
class Settings:
    """How long and how fast: the phase ends after `samples` if given, else after `minutes` of training."""

    minutes: float
    samples: int | None = None
    batch: int = 128
    learning_rate: float = 1e-3  # of AdamW; text encoders take four tenths of it
    matrix_learning_rate: float = 5e-3  # of Muon, in AdamW's units
    decay: float = 0.5
    average: float = 0.995
    compile: bool = False
    save_minutes: float = 3.0
    look_minutes: float = 12.0


def _optimizers(model: TextToLatent, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else that trains.

    Text encoders learn slowly: at the rate of the rest they forget which word a token is.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "transformer_blocks." in name]
    encoders = [p for name, p in named if not name.startswith("transformer.")]
    chosen = {id(p) for p in (*matrices, *encoders)}
    others = [p for _, p in named if id(p) not in chosen]
    groups = [(others, settings.learning_rate), (encoders, 0.4 * settings.learning_rate)]
    return [
        Muon(matrices, settings.matrix_learning_rate),
        *(torch.optim.AdamW(group, rate, betas=(0.9, 0.98), weight_decay=0.01) for group, rate in groups if group),
    ]


def compile_blocks(model: TextToLatent) -> None:
    """Compile each block by itself, so that any may be left out."""
    for stack in (model.transformer.transformer_blocks, model.transformer.single_transformer_blocks):
        for block in stack:
            block.compile()


def contact_sheet(images: list[Image], path: Path, columns: int = 10, zoom: int = 3) -> None:
    """Write `images` as one PNG, `columns` to a row."""
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    sheet = np.concatenate([row for row in rows if row.shape == rows[0].shape])
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(path)


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process writes files."""
    return world()[0] == 0


def share_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes; where a block was left out, it counts as zero."""
    if not dist.is_initialized():
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def _agreed(seconds: float) -> float:
    """The main process's clock: all end a phase at the same step."""
    clock = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(clock, 0)
    return clock.item()


@final
class Trainer:
    """Trains `model` by `loss`; everything that a continuation needs is in `run`/`name`.safetensors."""

    def __init__(self, run: Path, name: str, model: TextToLatent, settings: Settings) -> None:
        """Take `model` where it stands, or where the checkpoint stands."""
        self.run, self.name, self.model, self.settings = run, name, model, settings
        self.path = run / f"{name}.safetensors"
        self.optimizers = _optimizers(model, settings)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.average = {key: value.detach().clone() for key, value in model.named_parameters()}
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        state = load_if_there(self.path)
        if state:
            model.load_state_dict(state["model"])
            for key, value in state["average"].items():
                self.average[key].copy_(value)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]

    def share(self) -> float:
        """How much of the phase is done, in [0, 1]."""
        if self.settings.samples:
            return min(self.samples / self.settings.samples, 1.0)
        return min(self.seconds / (60 * self.settings.minutes), 1.0)

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
        }
        save_atomically(state, self.path)

    def train(self, pool: Pool, loss: Loss, look: Look) -> None:
        """Train to the end of the phase, with a checkpoint and a look every few minutes."""
        if self.settings.compile:
            compile_blocks(self.model)
        before, saved, looked = time.monotonic(), self.seconds, self.seconds
        started, first = self.seconds, self.samples
        while self.share() < 1:
            self.advance(pool, loss)
            now = time.monotonic()
            self.seconds, before = _agreed(self.seconds + now - before), now
            if self.seconds - saved > 60 * self.settings.save_minutes:
                saved = self.seconds
                pool.refresh()
                if is_main():
                    self.save()
                    self._report((self.samples - first) / (self.seconds - started))
            if self.seconds - looked > 60 * self.settings.look_minutes:
                looked = self.seconds
                if is_main():
                    self._look(look)
                before = time.monotonic()
        if is_main():
            self.save()
            self._look(look)
        if dist.is_initialized():
            dist.barrier()

    def advance(self, pool: Pool, loss: Loss) -> None:
        """One step; its randomness depends on the step's number alone, so a continuation repeats it exactly."""
        rank, ranks = world()
        number = self.step * ranks + rank
        rng = np.random.default_rng((5, number))
        generator = torch.Generator(pool.device).manual_seed(number)
        factor = warmup_stable_decay(self.share(), 1, decay=self.settings.decay)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * factor
        batch = pool.draw(self.settings.batch, rng)
        # The backward of flash attention is several times slower than plain matrices on a CPU.
        plain = sdpa_kernel(SDPBackend.MATH) if pool.device.type == "cpu" else contextlib.nullcontext()
        with plain:
            with torch.autocast(pool.device.type, torch.bfloat16):
                value = loss(batch, rng, generator)
            value.backward()
        if not torch.isfinite(value):
            raise FloatingPointError(f"{self.name}: loss {value.item()} at step {self.step}")
        share_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        self.losses.append(value.item())
        self.step, self.samples = self.step + 1, self.samples + self.settings.batch * ranks

    def _report(self, rate: float) -> None:
        row = {"phase": self.name, "samples": self.samples, "minutes": round(self.seconds / 60, 1)}
        row |= {"loss": round(float(np.mean(self.losses[-200:])), 4), "per_second": round(rate)}
        append_line(self.run / "loss.jsonl", row)
        self.losses = self.losses[-200:]

    def averaged(self) -> TextToLatent:
        """A copy of the model with the averaged weights, for evaluation."""
        copy = TextToLatent().to(self.model.image_ids.device)
        put_weights(copy, self.average)
        return copy.eval().requires_grad_(False)

    def _look(self, look: Look) -> None:
        captions, images = look(self.averaged())
        scores = {key: round(value, 3) for key, value in score_by_category(captions, images).items()}
        row: dict[str, Any] = {
            "phase": self.name,
            "samples": self.samples,
            "minutes": round(self.seconds / 60, 1),
        }
        row["loss"] = round(float(np.mean(self.losses[-200:])), 4)
        append_line(self.run / "curve.jsonl", row | scores)
        contact_sheet(images, self.run / "looks" / f"{self.name}-{self.samples:07d}.png")
