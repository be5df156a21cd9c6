"""Images as input: what editing pipelines are given, what autoencoders make of finished images, and what is refused."""

import dataclasses

import pytest
import torch
from PIL import Image
from runs import desk

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Evaluate
from ppcl_toolkit.running.encoding import Encoder
from ppcl_toolkit.running.images import image_path, pixels
from ppcl_toolkit.stages.evaluate import examine, measure
from ppcl_toolkit.stages.samples import load_samples, record_samples

EDITS = ["flux_kontext", "qwen_image_edit", "qwen_image_edit_2509", "qwen_image_edit_2511"]


def recorded(world, folder, **section):
    record_samples(world.runner, world.teacher, world.recipe(samples={"count": 2, **section}), desk(folder))
    return load_samples(folder)


@pytest.mark.parametrize("family", EDITS)
def test_an_edit_is_drawn_from_its_image_and_its_instruction(family, worlds, tmp_path):
    world = worlds[family]
    section = Evaluate(edits=str(world.folder / "edits"), count=2, seeds=(0,), batch=4)
    exam = examine(section, world.call)
    assert exam.prompts == ("paint it red", "a longer prompt")
    assert (exam.batch, exam.scored) == (1, False)
    measure(world.teacher.pipeline, exam, tmp_path / "own", progress=lambda *_: None)
    swapped = dataclasses.replace(exam, edits=exam.edits[::-1])
    measure(world.teacher.pipeline, swapped, tmp_path / "swapped", progress=lambda *_: None)
    one, other = (pixels(image_path(tmp_path / name, 0, 0)) for name in ("own", "swapped"))
    assert one.shape == (world.call["height"], world.call["width"], 3)
    assert (one != other).any()


@pytest.mark.parametrize("family", ["flux", "flux_kontext", "sd3", "qwen_image"])
def test_finished_images_are_samples_without_reference(family, worlds, tmp_path):
    world = worlds[family]
    found = recorded(world, tmp_path, images=str(world.folder / "edits"))
    assert len(found) == 2
    for sample in found:
        assert sample.reference is None
        assert sample.latents.shape == world.samples[0].latents.shape
    assert not torch.equal(found[0].latents, found[1].latents)
    batch = dataclasses.replace(world.batches(), samples=found)[0]
    assert world.teacher.transformer(**batch)[0].isfinite().all()


@torch.no_grad()
def test_latents_of_qwen_image_are_those_of_its_editing_pipeline(worlds):
    world, pipeline = worlds["qwen_image"], worlds["qwen_image_edit"].teacher.pipeline
    own = world.teacher.pipeline
    encoder = Encoder(own, world.adapter, lambda: own(prompt="a circle", **world.call))
    images = torch.rand(1, 3, 128, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = pipeline._encode_vae_image(images.unsqueeze(2), torch.Generator())
    own.vae.load_state_dict(pipeline.vae.state_dict())
    assert torch.equal(encoder.latents(images), expected)
    assert expected.shape == (1, 1, 1, 4, 2)


def test_an_autoencoder_that_does_not_say_how_it_scales_is_refused(worlds, tmp_path, monkeypatch):
    vae = worlds["flux"].teacher.pipeline.vae
    unscaled = {name: value for name, value in vae.config.items() if name != "scaling_factor"}
    monkeypatch.setattr(vae, "_internal_dict", type(vae.config)(unscaled))
    with pytest.raises(PpclError, match="AutoencoderKL has neither scaling_factor nor latents_mean"):
        recorded(worlds["flux"], tmp_path, images=str(worlds["flux"].folder / "edits"))


def test_edits_need_a_pipeline_that_edits(worlds, tmp_path):
    world, folder = worlds["sd3"], str(worlds["sd3"].folder / "edits")
    with pytest.raises(PpclError, match="samples.edits: StableDiffusion3Pipeline takes no image to edit; give prompts"):
        recorded(world, tmp_path / "samples", edits=folder)
    exam = examine(Evaluate(edits=folder), world.call)
    with pytest.raises(PpclError, match="evaluate.edits: StableDiffusion3Pipeline takes no image"):
        measure(world.teacher.pipeline, exam, tmp_path / "images", progress=lambda *_: None)


@pytest.mark.parametrize("family", EDITS[1:])
def test_an_editing_pipeline_needs_edits(family, worlds, tmp_path):
    world = worlds[family]
    with pytest.raises(PpclError, match=r"QwenImageEdit.*edits images.*give samples.edits and evaluate.edits"):
        recorded(world, tmp_path, prompts=str(world.folder / "prompts.txt"))
    with pytest.raises(PpclError, match="edits images"):
        recorded(world, tmp_path, images=str(world.folder / "edits"))


def test_a_folder_of_edits_that_cannot_be_used_is_named(worlds, tmp_path):
    world = worlds["flux_kontext"]
    (tmp_path / "edits").mkdir()
    with pytest.raises(PpclError, match="samples.edits: .*edits: no image in it"):
        recorded(world, tmp_path / "samples", edits=str(tmp_path / "edits"))
    Image.new("RGB", (8, 8)).save(tmp_path / "edits" / "a.png")
    with pytest.raises(PpclError, match=r"samples.edits: .*no text \(.txt\) beside a.png"):
        recorded(world, tmp_path / "samples", edits=str(tmp_path / "edits"))
    with pytest.raises(PpclError, match="evaluate.edits: .* is no folder"):
        examine(Evaluate(edits=str(tmp_path / "none")), world.call)


def test_prompts_that_fill_a_batch_unevenly_are_still_one_row_each(worlds, tmp_path):
    """Guidance in one call puts the rows of the empty prompt before those of the prompts."""
    world = worlds["sd3"]
    single = recorded(world, tmp_path / "single", prompts=str(world.folder / "prompts.txt"), batch=1)
    both = recorded(world, tmp_path / "both", prompts=str(world.folder / "prompts.txt"), batch=2)
    assert len(single) == len(both) == 4
    for one, other in zip([single[0], single[2], single[1], single[3]], both, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-3)
        texts = [sample.arguments["encoder_hidden_states"] for sample in (one, other)]
        assert torch.allclose(*texts, atol=1e-4)
