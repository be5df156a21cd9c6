"""Finished images as samples, of every family's pipeline: what it decodes of them is what its autoencoder made."""

import functools

import pytest
import torch
from PIL import Image
from test_stock import PIPELINES

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.encoding import Encoder

VIDEOS = ("wan", "cogvideox", "ltx_video", "hunyuan_video", "mochi")
PATCHED = ("flux2",)
"""Their latents are put into patches by code of the pipeline that nothing but the pipeline knows."""
ODD = ("lumina2",)
"""Its pipeline knows of autoencoders that make a latent of 8x8 pixels, and the tiny one makes one of each."""
DRAWN = [name for name in PIPELINES if name not in (*VIDEOS, *PATCHED, *ODD)]


@functools.cache
def made(name):
    """A pipeline, and what it is called with."""
    build, asked = PIPELINES[name]
    return build(), {**asked, "num_inference_steps": 2, "output_type": "pil"}


def encoder(name):
    pipeline, asked = made(name)
    return Encoder(pipeline, load_adapter(name), lambda: pipeline(prompt="a circle", **asked))


class Stop(Exception):
    """Nothing need be decoded."""


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_decoded_of_a_sample_is_what_the_autoencoder_made_of_the_image(name, monkeypatch):
    pipeline, asked = made(name)
    picture = Image.effect_noise((asked["width"], asked["height"]), 60).convert("RGB")
    call = {key: value for key, value in asked.items() if key != "output_type"}
    sample = encoder(name).sample("a circle", picture, call)
    decoded, step = [], pipeline.scheduler.step

    # The run ends with the sample, whatever it began with.
    def stepped(velocity, timestep, latents, *args, **kwargs):
        step(velocity, timestep, latents, *args, **kwargs)
        return (sample.latents.reshape(latents.shape),)

    def decode(latents, *_, **__):
        decoded.append(latents)
        raise Stop

    monkeypatch.setattr(pipeline.scheduler, "step", functools.wraps(step)(stepped))
    monkeypatch.setattr(pipeline.vae, "decode", decode)
    with pytest.raises(Stop):
        pipeline(prompt="a circle", **asked)
    colours = "RGBA" if name == "qwen_image21" else "RGB"
    pixels = pipeline.image_processor.preprocess(picture.convert(colours))
    with torch.no_grad():
        found = pipeline.vae.encode(pixels.unsqueeze(2) if decoded[0].ndim == 5 else pixels)
    expected = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
    assert expected.std() > 0
    torch.testing.assert_close(decoded[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*VIDEOS, *PATCHED])
def test_what_makes_no_single_images_is_refused(name):
    said = "has no image_processor" if name in VIDEOS else "AutoencoderKLFlux2 has neither scaling_factor nor"
    with pytest.raises(PpclError, match=said):
        encoder(name)


def test_latents_that_are_scaled_by_something_else_are_refused(monkeypatch):
    pipeline, _ = made("sd3")
    monkeypatch.setattr(pipeline.vae.config, "scaling_factor", 0.7 * pipeline.vae.config.scaling_factor, raising=False)
    own = pipeline.vae.config.get
    monkeypatch.setattr(pipeline.vae.config, "get", lambda name: 2.0 if name == "scaling_factor" else own(name))
    with pytest.raises(PpclError, match=r"samples.images: StableDiffusion3Pipeline does not shift and scale latents"):
        encoder("sd3")
    assert "decode" not in vars(pipeline.vae)
