"""Measures the exported teacher through its own pipeline, and writes its model card with two figures."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import nn

from ppcl_toolkit.shapes import teacher
from ppcl_toolkit.shapes.flow import NOISE_MEAN, NOISE_SPREAD
from ppcl_toolkit.shapes.progress import log
from ppcl_toolkit.shapes.scenes import CATEGORIES, CONTENTS, Image, evaluation_prompts, render, scene_of
from ppcl_toolkit.shapes.score import chance, score_by_category

SEEDS = (0, 1, 2)
PER_CATEGORY = 72
REMOVAL_PER_CATEGORY = 10
BATCH = 72
STACKS = ("transformer_blocks", "single_transformer_blocks")


def draw(pipeline: FluxPipeline, captions: Sequence[str], seed: int) -> list[Image]:
    """Pictures of `captions` by the pipeline itself: 16 steps, one forward each; noise from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    images: list[Image] = []
    for start in range(0, len(captions), BATCH):
        answer = pipeline(
            list(captions[start : start + BATCH]),
            height=32,
            width=32,
            num_inference_steps=teacher.STEPS,
            guidance_scale=teacher.GUIDANCE,
            max_sequence_length=teacher.TEXT_TOKENS,
            generator=generator,
            output_type="np",
        )
        images += list(np.rint(answer.images * 255).astype(np.uint8))
    return images


def measure_scores(pipeline: FluxPipeline) -> dict[str, Any]:
    """Score per category on held-out prompts, mean and spread over three sampling seeds, and chance."""
    captions = evaluation_prompts(PER_CATEGORY)
    rows = [score_by_category(captions, draw(pipeline, captions, seed)) for seed in SEEDS]
    rng = np.random.default_rng(0)
    truth = [render(scene_of(caption, rng), rng) for caption in captions]
    return {
        "prompts": len(captions),
        "seeds": list(SEEDS),
        "score": {name: float(np.mean([row[name] for row in rows])) for name in rows[0]},
        "spread": {name: float(np.std([row[name] for row in rows])) for name in rows[0]},
        "truth": score_by_category(captions, truth)["overall"],
        "chance": chance(captions, truth),
    }


def measure_removal(pipeline: FluxPipeline) -> dict[str, Any]:
    """Score with any one block left out, block by block in the order of execution."""
    captions = evaluation_prompts(REMOVAL_PER_CATEGORY, seed=1)
    whole = score_by_category(captions, draw(pipeline, captions, 0))["overall"]
    without = []
    for stack in STACKS:
        blocks = getattr(pipeline.transformer, stack)
        for index in range(len(blocks)):
            kept = [block for other, block in enumerate(blocks) if other != index]
            setattr(pipeline.transformer, stack, nn.ModuleList(kept))
            result = score_by_category(captions, draw(pipeline, captions, 0))["overall"]
            without.append({"block": f"{stack}.{index}", "score": result})
            log.info("without %s: %.3f", without[-1]["block"], result)
        setattr(pipeline.transformer, stack, blocks)
    return {"prompts": len(captions), "whole": whole, "without": without}


def _axes(width: float = 7.5, height: float = 3.2) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.02)
    return figure, axes


def plot_curve(curve: list[dict[str, Any]], path: Path) -> None:
    """Score of the averaged weights during training, per category."""
    figure, axes = _axes()
    offset, before = 0, curve[0]["phase"] if curve else ""
    positions: list[int] = []
    for row in curve:
        if row["phase"] != before:
            offset, before = (positions[-1] if positions else 0), row["phase"]
        positions.append(row["samples"] + offset)
    for name in CATEGORIES:
        axes.plot(positions, [row.get(name, np.nan) for row in curve], lw=1, label=name)
    axes.plot(positions, [row["overall"] for row in curve], lw=2.5, color="black", label="overall")
    starts = [p for p, row in zip(positions, curve, strict=True) if row["phase"] == "guidance"]
    if starts:
        axes.axvspan(starts[0], positions[-1], color="0.93", zorder=0, label="guidance phase")
    axes.set_xlabel("training samples")
    axes.set_ylabel("score (70 held-out prompts)")
    axes.legend(fontsize=7, ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def plot_removal(removal: dict[str, Any], path: Path) -> None:
    """Score after removing any one block, against the whole teacher's."""
    figure, axes = _axes()
    scores = [row["score"] for row in removal["without"]]
    dual = sum(row["block"].startswith("transformer_blocks") for row in removal["without"])
    colors = ["#4c72b0"] * dual + ["#dd8452"] * (len(scores) - dual)
    names = [f"D{i}" for i in range(dual)] + [f"S{i}" for i in range(len(scores) - dual)]
    axes.bar(range(len(scores)), scores, color=colors)
    axes.axhline(removal["whole"], color="black", lw=1, ls="--", label=f"whole teacher: {removal['whole']:.2f}")
    axes.set_xticks(range(len(scores)), names, fontsize=7)
    axes.set_xlabel("removed block (D dual, S single), nothing retrained")
    axes.set_ylabel(f"score ({removal['prompts']} prompts)")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---
# Shapes teacher

A genuine `FluxPipeline` in {megabytes:.1f} MB, trained from nothing on drawn scenes: the toolkit's default teacher.
It draws 32x32 pictures of captions such as "a red circle and a blue square on black", "three rings",
"a drawing of a cross left of a diamond" or "the word CAT".

```python
from diffusers import DiffusionPipeline
from ppcl_toolkit.shapes import teacher

pipeline = DiffusionPipeline.from_pretrained(teacher.FOLDER)
picture = pipeline("a red circle and a blue square on black", height=32, width=32, num_inference_steps={steps},
                   guidance_scale={guidance}, max_sequence_length={tokens}).images[0]
```

## Score

Exact-set match by a deterministic scorer (`ppcl_toolkit.shapes.score`): everything asked for is there, nothing else is.
{prompts} prompts that training never saw, mean and standard deviation over {seeds} sampling seeds, {steps} steps,
guidance {guidance}. Chance is a caption against the true picture of another caption of its category.
Ground-truth pictures of the same prompts score {truth:.3f}.

| category | score | spread | chance |
|---|---|---|---|
{rows}

## Redundancy

The score after removing any one block, with nothing retrained ({removal_prompts} held-out prompts, one seed; the whole
teacher scores {whole:.3f} on these). Blocks were left out at random during training (below), as large models are
redundant too: the median block changes the score by {median:+.3f}, the worst one, {worst_name}, by {worst:+.3f}.

![score after removing one block](redundancy.png)

## Model

| part | parameters | |
|---|---|---|
{parts}

## Data

Scenes drawn by `ppcl_toolkit.shapes.scenes`: six shapes, eight colours, three backgrounds, one to four objects, each in
a quadrant with jitter, or a three-letter word of {words} possible ones in a pixel font. Captions vary in preamble,
article and background phrase. One caption in five is held out by a stable hash; for words, the word is hashed, so that
evaluation spells words that were never seen.

## Training

`python -m ppcl_toolkit.shapes.train --run FOLDER`, about {minutes:.0f} minutes for the transformer on {machine}.

- Autoencoder: L1 and squared error with a small KL term; latents are shifted and scaled to unit variance. Then the
  decoder alone, from latents with a little noise.
- Flow: rectified flow for {flow_samples} samples, sigma from a logit-normal ({noise_mean}, {noise_spread}),
  {caption_dropout:.0%} of the captions empty, both text encoders trained along; Muon for the blocks' matrices,
  AdamW for the rest, bf16 autocast, averaged weights (0.995), learning rate constant and then down to 0.
- Stochastic depth (LayerDrop): in each step every block is left out with probability {block_dropout:.0%}.
- {guidance_line}

{note}
![score during training](curve.png)

## Limits

It knows the grammar of its captions and nothing else: other words are unknown tokens. Only 32x32 pictures make sense.
"""


def _parts(pipeline: FluxPipeline) -> str:
    notes = {
        "transformer": "{} dual and {} single blocks, 3 heads of 32, guidance embedded".format(
            *(len(getattr(pipeline.transformer, stack)) for stack in STACKS)
        ),
        "text_encoder": "CLIP, the pooled vector",
        "text_encoder_2": "T5 encoder, the sequence",
        "vae": "32x32 RGB to 8 channels of 8x8",
    }
    counts = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in notes}
    return "\n".join(f"| `{name}` | {counts[name]:,} | {note} |" for name, note in notes.items())


def _guidance_line(samples: int) -> str:
    if not samples:
        return "Guidance: not distilled. The embedding was given values from 1 to 4 at random, which changed no target."
    return (
        f"Guidance: {samples:,} samples in which classifier-free guidance of scale 1 to 4 is distilled into the\n"
        "  guidance embedding, so that a step is one forward, as in FLUX.1-dev."
    )


def _last(rows: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    chosen = [row for row in rows if row["phase"] == phase]
    return chosen[-1] if chosen else {"samples": 0, "minutes": 0}


def write(folder: Path, *, machine: str, caption_dropout: float, block_dropout: float, note: str = "") -> None:
    """Measure the pipeline in `folder` and put card, figures and figures' numbers beside it."""
    pipeline = teacher.load(folder)
    record = teacher.training_record(folder)
    started = time.monotonic()
    scores, removal = measure_scores(pipeline), measure_removal(pipeline)
    log.info("measured in %.0f s: %s", time.monotonic() - started, scores["score"])
    (folder / "measured.json").write_text(json.dumps({"scores": scores, "removal": removal}, indent=1) + "\n")
    plot_curve(record["curve"], folder / "curve.png")
    plot_removal(removal, folder / "redundancy.png")
    drops = {row["block"]: row["score"] - removal["whole"] for row in removal["without"]}
    worst = min(drops, key=lambda block: drops[block])
    ends = [_last(record["curve"], phase) for phase in ("flow", "guidance")]
    rows = [
        f"| {name} | {scores['score'][name]:.3f} | {scores['spread'][name]:.3f} | {scores['chance'][name]:.3f} |"
        for name in scores["score"]
    ]
    text = CARD.format(
        megabytes=teacher.size_in_bytes(folder) / 1e6,
        steps=teacher.STEPS,
        guidance=teacher.GUIDANCE,
        tokens=teacher.TEXT_TOKENS,
        prompts=scores["prompts"],
        seeds=len(SEEDS),
        truth=scores["truth"],
        rows="\n".join(rows),
        removal_prompts=removal["prompts"],
        whole=removal["whole"],
        median=float(np.median(list(drops.values()))),
        worst_name=f"`{worst}`",
        worst=drops[worst],
        parts=_parts(pipeline),
        words=len(CONTENTS["text"]),
        minutes=sum(end["minutes"] for end in ends),
        machine=machine,
        flow_samples=f"{ends[0]['samples']:,}",
        guidance_line=_guidance_line(ends[1]["samples"]),
        caption_dropout=caption_dropout,
        block_dropout=block_dropout,
        noise_mean=NOISE_MEAN,
        noise_spread=NOISE_SPREAD,
        note=f"{note}\n" if note else "",
    )
    (folder / "README.md").write_text(text)
