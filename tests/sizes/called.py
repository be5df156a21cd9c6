"""Pipelines of published sizes without data: text encoders, autoencoder and all, and the stages that call them."""

from collections.abc import Callable
from typing import Any

import diffusers
import parts
import torch
from PIL import Image
from subjects import Subject
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.running import noising
from ppcl_toolkit.stages import check, evaluate, samples


class _Scheduler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Finds its steps without values to compare."""

    def index_for_timestep(self, *_: Any) -> int:
        return 0


def _flux() -> dict[str, Any]:
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return {
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
        "tokenizer": parts.clip_tokenizer(),
        "tokenizer_2": parts.t5_tokenizer(),
        "vae": diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
    }


def _qwen_image() -> dict[str, Any]:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": parts.qwen_tokenizer(),
        "vae": diffusers.AutoencoderKLQwenImage(),
    }


class _QwenImagePipeline(diffusers.QwenImagePipeline):
    """Has all of a text seen."""

    def _extract_masked_hidden(self, hidden_states: torch.Tensor, _: torch.Tensor) -> list[torch.Tensor]:
        return list(hidden_states.unbind(0))


FAMILIES: dict[str, tuple[type, Callable[[], dict[str, Any]]]] = {
    "flux": (diffusers.FluxPipeline, _flux),
    "qwen_image": (_QwenImagePipeline, _qwen_image),
}


def called(subject: Subject, transformer: Any = None) -> Any:
    """Return the pipeline around a transformer, the teacher's by default; its weights lie in files."""
    kind, make = FAMILIES[subject.model.family]
    with subject.ledger.reading(here=subject.model.in_place):
        made = make()
        for part in made.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, subject.model.dtype).requires_grad_(False).eval()
        sizes = [sum(p.numel() for p in part.parameters()) for part in made.values() if isinstance(part, nn.Module)]
        listed = [size // subject.model.dtype.itemsize for size in subject.model.others]
        assert sorted(sizes) == sorted(listed), f"{sizes} are not the parts that the adapter lists: {listed}"
        found = kind(scheduler=_Scheduler(), transformer=transformer or subject.runner.transformer, **made)
    # All of it is prompt, and five tokens end a template.
    found.prompt_template_encode, found.prompt_template_encode_start_idx = "{}aaaaa", 0
    found.set_progress_bar_config(disable=True)
    found.image_processor.postprocess = _pictures
    return found


def _pictures(pixels: torch.Tensor, **_: Any) -> list[Image.Image]:
    """Return pictures as large as `pixels` are, which hold nothing."""
    pixels.float().cpu()  # as every processor has them
    return [Image.new("RGB", (pixels.shape[-1], pixels.shape[-2])) for _ in range(len(pixels))]


def _prompts(subject: Subject) -> str:
    """Write prompts as long as a plan takes them to be, a token a letter; return the file."""
    subject.desk.folder.mkdir(parents=True, exist_ok=True)
    path = subject.desk.folder / "prompts.txt"
    path.write_text(f"{'a' * 128}\n" * 8)
    return str(path)


def _teacher(subject: Subject) -> Teacher:
    return Teacher(called(subject), subject.adapter, subject.model.family, "it")


def _of(subject: Subject, steps: int = 1) -> Any:
    """Return the recipe of a run with a few denoising steps, and prompts that are there."""
    recipe, prompts = subject.recipe, _prompts(subject)
    call = {**recipe.teacher.call, "num_inference_steps": steps}
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"call": call}),
            "samples": recipe.samples.model_copy(update={"prompts": prompts}),
            "evaluate": recipe.evaluate.model_copy(update={"prompts": prompts}),
        }
    )


def run_samples(subject: Subject) -> None:
    """Record what the pipeline's transformer is called with."""
    samples.record_samples(subject.runner, _teacher(subject), _of(subject), subject.desk)


def run_check(subject: Subject) -> None:
    """Check the adapter, but for values."""
    recipe, teacher = _of(subject, 3), _teacher(subject)
    check.check_negatives = check.check_steps = lambda *_: None
    check.noising_of = lambda *_: noising.Noising(kind="flow", scale=1.0)
    check.write_json = lambda *_: None
    check.check(
        subject.runner, teacher.pipeline, lambda prompt=None: samples.rehearse(teacher, recipe, prompt), subject.desk
    )


def run_evaluate(subject: Subject) -> None:
    """Make pictures by the teacher, and by a variant that lies in files as it does."""
    recipe, teacher = _of(subject), _teacher(subject)
    evaluate._fingerprint = lambda _: "it"

    def opened(*_: Any, **__: Any) -> Any:
        with subject.ledger.reading(here=True):
            with torch.utils._python_dispatch._disable_current_modes():  # tables that are no buffers are copied
                student = subject.model.student(subject.largest)
            student.to_empty(device="cpu").to(subject.model.dtype)
            for module in student.modules():
                tables = {name: v for name, v in vars(module).items() if isinstance(v, torch.Tensor)}
                vars(module).update({name: torch.empty(v.shape, dtype=v.dtype) for name, v in tables.items()})
        return called(subject, student)

    evaluate.load_pipeline = opened
    variants = [{"name": "it", "path": "it"}]
    batches = subject.batches(recipe.samples.batch)
    evaluate.evaluate(subject.runner, teacher, recipe, variants, batches, subject.desk)
