"""Trains the embedded teacher from nothing: `python -m ppcl_toolkit.shapes.train --run FOLDER`.

Phases, in order: vae, decoder (the same, refined), pool (encoded scenes), flow (rectified flow), guidance
(classifier-free guidance distilled into the guidance embedding), export, card. Each continues where it was
stopped, also by a kill; `--start FOLDER` begins with the weights of an exported pipeline. Several processes
(`torchrun --nproc-per-node 2 -m -- ppcl_toolkit.shapes.train ...`) share the batches of flow and guidance.

On a CPU, set OMP_NUM_THREADS=1 with one process a core, and MALLOC_TRIM_THRESHOLD_=4294967296
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456: without them a large part of the time goes into page
faults.
"""

import argparse
import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_toolkit.shapes import card, teacher, vae
from ppcl_toolkit.shapes.flow import (
    Batch,
    Pool,
    TextToLatent,
    dropped_blocks,
    encode_pool,
    generate,
    noised,
    put_weights,
    tokenize,
)
from ppcl_toolkit.shapes.loop import Settings, Trainer, compile_blocks, is_main
from ppcl_toolkit.shapes.progress import load_if_there, log, read_lines, ready, save_atomically
from ppcl_toolkit.shapes.scenes import Image, evaluation_prompts

PHASES = ("vae", "decoder", "pool", "flow", "guidance", "export", "card")
SHARED_PHASES = ("flow", "guidance")  # which several processes do together
START = "start.safetensors"
CAPTION_DROPOUT = 0.1
# CLIP's vector alone can say which words a caption has: where it always does, attention to T5's tokens, and with it
# who stands where and which colour is whose, is hardly learned.
POOLED_DROPOUT = 0.8
GUIDANCE_RANGE = (1.0, 4.0)
VAE_SAMPLES, DECODER_SAMPLES = 205_000, 200_000


def flow_loss(
    batch: Batch,
    rng: np.random.Generator,
    generator: torch.Generator,
    *,
    model: TextToLatent,
    empty: tuple[Tensor, Tensor],
    block_dropout: float,
) -> Tensor:
    """Squared error of the velocity, with captions and blocks left out at random."""
    dropped = torch.from_numpy(rng.random(len(batch.latents)) < CAPTION_DROPOUT).to(batch.latents.device)
    silent = dropped | torch.from_numpy(rng.random(len(dropped)) < POOLED_DROPOUT).to(dropped.device)
    ids = [
        torch.where(out[:, None], none, ids) for out, none, ids in zip((dropped, silent), empty, batch[1:], strict=True)
    ]
    noisy, sigma, target = noised(batch.latents, generator)
    # Any guidance means none until the phase `guidance` gives it a meaning: the embedding is always valid.
    low, high = GUIDANCE_RANGE
    guidance = low + (high - low) * torch.rand(len(sigma), generator=generator, device=sigma.device)
    with dropped_blocks(model.transformer, rng, block_dropout):
        velocity = model.velocity(noisy, sigma, model.text(*ids), guidance)
    return (velocity.float() - target).square().mean()


def guidance_loss(
    batch: Batch,
    rng: np.random.Generator,
    generator: torch.Generator,
    *,
    models: tuple[TextToLatent, TextToLatent],
    empty: tuple[Tensor, Tensor],
    block_dropout: float,
) -> Tensor:
    """Squared error of one guided forward against the frozen model's two, at a random guidance scale."""
    student, frozen = models
    noisy, sigma, _ = noised(batch.latents, generator)
    low, high = GUIDANCE_RANGE
    drawn = torch.rand(len(sigma), generator=generator, device=sigma.device)
    guidance = low + (high - low) * drawn
    with torch.no_grad():
        text = frozen.text(*batch[1:])
        one = torch.ones_like(sigma)
        conditional = frozen.velocity(noisy, sigma, text, one)
        nothing = frozen.text(*(ids.expand(len(sigma), -1) for ids in empty))
        without = frozen.velocity(noisy, sigma, nothing, one)
        target = without + guidance[:, None, None] * (conditional - without)
    with dropped_blocks(student.transformer, rng, block_dropout):
        velocity = student.velocity(noisy, sigma, text, guidance)
    return (velocity.float() - target.float()).square().mean()


def _look(
    model: TextToLatent, *, autoencoder: vae.AutoencoderKL, embedded: bool, per_category: int = 10
) -> tuple[list[str], list[Image]]:
    captions = evaluation_prompts(per_category, seed=3)
    images = generate(model, autoencoder, captions, guidance=teacher.GUIDANCE, embedded=embedded)
    return captions, images


def _empty(device: torch.device) -> tuple[Tensor, Tensor]:
    t5_ids, clip_ids = tokenize([""])
    return t5_ids.long().to(device), clip_ids.long().to(device)


def start_from(run: Path, folder: Path) -> None:
    """Put an exported pipeline where the phases look for what came before: its autoencoder and its weights."""
    if not (run / START).exists():
        pipeline = teacher.load(folder)
        config = pipeline.vae.config
        model = TextToLatent()
        parts = ((model.clip, pipeline.text_encoder), (model.t5, pipeline.text_encoder_2))
        for part, trained in (*parts, (model.transformer, pipeline.transformer)):
            part.load_state_dict(trained.state_dict())
        autoencoder = {"model": pipeline.vae.state_dict(), "shift": config.shift_factor, "scale": config.scaling_factor}
        run.mkdir(parents=True, exist_ok=True)
        save_atomically({**autoencoder, "finished": True}, run / "vae.safetensors")
        save_atomically(model.state_dict(), run / START)


def train_flow(run: Path, device: torch.device, settings: Settings, block_dropout: float) -> None:
    """The phase `flow`."""
    torch.manual_seed(0)
    model = TextToLatent()
    if started := load_if_there(run / START):
        model.load_state_dict(started)
    model.to(device)
    trainer = Trainer(run, "flow", model, settings)
    look = partial(_look, autoencoder=vae.load(run, device), embedded=False)
    trainer.train(
        Pool(run, device), partial(flow_loss, model=model, empty=_empty(device), block_dropout=block_dropout), look
    )


def averaged_model(run: Path, name: str) -> TextToLatent:
    """The averaged weights of the checkpoint `name` of `run`."""
    state = load_if_there(run / f"{name}.safetensors")
    if not state:
        raise FileNotFoundError(f"no checkpoint {name}.safetensors in {run}: run the phase {name!r} first")
    model = TextToLatent()
    put_weights(model, state["average"])
    return model


def train_guidance(run: Path, device: torch.device, settings: Settings, block_dropout: float) -> None:
    """The phase `guidance`; the text encoders stay as they are."""
    frozen = averaged_model(run, "flow").to(device).requires_grad_(False)
    student = averaged_model(run, "flow").to(device)
    for encoder in (student.clip, student.t5):
        encoder.requires_grad_(False)
    if settings.compile:
        compile_blocks(frozen)
    trainer = Trainer(run, "guidance", student, settings)
    loss = partial(guidance_loss, models=(student, frozen), empty=_empty(device), block_dropout=block_dropout)
    trainer.train(Pool(run, device), loss, partial(_look, autoencoder=vae.load(run, device), embedded=True))


def export(run: Path, folder: Path) -> None:
    """Write the pipeline to `folder`: the guided model where there is one, else the flow's."""
    name = "guidance" if (run / "guidance.safetensors").exists() else "flow"
    model = averaged_model(run, name)
    teacher.save(teacher.build(vae.load(run), model.transformer, (model.clip, model.t5)), folder)
    record = {"curve": read_lines(run / "curve.jsonl"), "loss": read_lines(run / "loss.jsonl")}
    (folder / "training.json").write_text(json.dumps(record) + "\n")
    log.info("wrote %s: %.1f MB, from the phase %s", folder, teacher.size_in_bytes(folder) / 1e6, name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--start", type=Path, help="train on from this pipeline; then skip the phases vae and decoder")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--minutes", type=float, default=90, help="length of the phase flow")
    parser.add_argument("--guidance-minutes", type=float, default=15, help="length of the phase guidance")
    parser.add_argument("--samples", type=int, help="length of the phase flow in samples instead")
    parser.add_argument("--guidance-samples", type=int, help="length of the phase guidance in samples instead")
    parser.add_argument("--pool", type=int, default=24, help="files of 16384 encoded scenes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--matrix-learning-rate", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the phase flow in which the rate falls")
    parser.add_argument("--block-dropout", type=float, default=0.05)
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--machine", default="one CPU core", help="what the card says it was trained on")
    parser.add_argument("--note", default="", help="a paragraph for the card's section on training")
    parser.add_argument("--out", type=Path, default=teacher.FOLDER, help="where the pipeline is written")
    return parser.parse_args()


def main() -> None:
    """Run the phases asked for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = _arguments()
    device = ready(given.device)
    if given.start and is_main():
        start_from(given.run, given.start)
    settings = Settings(
        given.minutes,
        given.samples,
        given.batch,
        given.learning_rate,
        given.matrix_learning_rate,
        given.decay,
        compile=given.compile,
    )
    guidance = Settings(
        given.guidance_minutes,
        given.guidance_samples,
        given.batch,
        given.learning_rate / 4,
        given.matrix_learning_rate / 4,
        decay=0.8,
        compile=given.compile,
    )
    actions = {
        "vae": lambda: vae.train(given.run, device, samples=VAE_SAMPLES),
        "decoder": lambda: vae.refine(given.run, device, samples=DECODER_SAMPLES),
        "pool": lambda: encode_pool(given.run, vae.load(given.run, device), shards=given.pool),
        "flow": lambda: train_flow(given.run, device, settings, given.block_dropout),
        "guidance": lambda: train_guidance(given.run, device, guidance, given.block_dropout),
        "export": lambda: export(given.run, given.out),
        "card": lambda: card.write(
            given.out,
            machine=given.machine,
            caption_dropout=CAPTION_DROPOUT,
            block_dropout=given.block_dropout,
            note=given.note,
        ),
    }
    for phase in PHASES:
        if phase in given.phases and (is_main() or phase in SHARED_PHASES):
            actions[phase]()
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
