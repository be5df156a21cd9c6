"""The families of the contract: a tiny real pipeline of each, what it is called with, what was recorded from it."""

import functools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from runs import desk

from ppcl_toolkit.adapter import Adapter, adapter_for
from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.noising import Noising
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.check import check, load_noising
from ppcl_toolkit.stages.samples import load_samples, record_samples, rehearse

SMALL = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 8}
QWEN = {"height": 128, "width": 128, "num_inference_steps": 2}
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
FAMILIES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "flux": (tiny.flux_pipeline, SMALL, False),
    "flux_kontext": (tiny.flux_kontext_pipeline, {**SMALL, "max_area": 64, "_auto_resize": False}, True),
    "sd3": (tiny.sd3_pipeline, {**SMALL, "guidance_scale": 3.0}, False),
    "qwen_image": (tiny.qwen_image_pipeline, {**QWEN, **GUIDED}, False),
    "qwen_image_edit": (tiny.qwen_image_edit_pipeline, QWEN, True),
    "qwen_image_edit_2509": (tiny.qwen_image_edit_plus_pipeline, {**QWEN, **GUIDED}, True),
    "qwen_image_edit_2511": (functools.partial(tiny.qwen_image_edit_plus_pipeline, zero_cond_t=True), QWEN, True),
}
"""How a family's pipeline is made, its arguments beside prompt and image, and whether it edits images."""
PROMPTS = ("paint it red", "a longer prompt", "no", "draw a circle")


@dataclass
class World:
    """A family's teacher and its samples."""

    name: str
    teacher: Teacher
    call: dict[str, Any]
    edits: bool
    folder: Path
    samples: list[Sample]
    noising: Noising = Noising()

    @property
    def adapter(self) -> Adapter:
        return self.teacher.adapter

    @property
    def runner(self) -> Runner:
        return Runner(self.teacher.transformer, self.adapter)

    @property
    def chunks(self) -> list[list[int]]:
        """Prompts that share a call of the pipeline: texts of two lengths, so one of them is padded."""
        return [[0], [1], [2], [3]] if self.edits else [[0, 1], [2, 3]]

    def asked(self, chunk: list[int]) -> dict[str, Any]:
        """The arguments of the call of the pipeline for some prompts."""
        image = {"image": Image.open(self.folder / "edits" / f"{chunk[0]}.png")} if self.edits else {}
        negative = {n: [v] * len(chunk) for n, v in self.call.items() if n == "negative_prompt"}
        generators = [torch.Generator().manual_seed(42 + index) for index in chunk]
        return {
            **self.call,
            **image,
            **negative,
            "prompt": [PROMPTS[index] for index in chunk],
            "generator": generators,
            "output_type": "latent",
        }

    def batches(self, size: int = 2, **options) -> Batches:
        return Batches(samples=self.samples, adapter=self.adapter, size=size, seed=5, noising=self.noising, **options)

    def recipe(self, **sections) -> Recipe:
        texts = {"edits": str(self.folder / "edits")} if self.edits else {"prompts": str(self.folder / "prompts.txt")}
        base = {
            "teacher": {"path": str(self.folder / "teacher"), "dtype": "float32", "call": self.call},
            "samples": {**texts, "count": len(PROMPTS), "batch": len(self.chunks[0])},
            "evaluate": {**texts, "count": 2, "seeds": [0], "velocity_batches": 1},
            "targets": [{"name": "small", "params": "75%"}],
        }
        return Recipe.model_validate({**base, **sections})


def made(name: str, folder: Path) -> World:
    """Make a family's pipeline and its prompts in `folder`, and record it."""
    build, call, edits = FAMILIES[name]
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "edits").mkdir()
    for index, prompt in enumerate(PROMPTS):
        noise = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 40)).save(folder / "edits" / f"{index}.png")
        (folder / "edits" / f"{index}.txt").write_text(prompt)
    pipeline = build()
    pipeline.transformer.requires_grad_(False)
    adapter = adapter_for(type(pipeline.transformer).__name__)
    world = World(name, Teacher(pipeline, adapter, adapter.family, "tiny"), call, edits, folder, [])
    record_samples(world.runner, world.teacher, world.recipe(), desk(folder / "samples"))
    world.samples = load_samples(folder / "samples")
    check(world.runner, pipeline, partial(rehearse, world.teacher, world.recipe()), desk(folder / "check"))
    world.noising = load_noising(folder / "check")
    return world
