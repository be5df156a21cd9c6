"""Finished images as samples: their clean latents, scaled as their pipeline has them.

An autoencoder's config says by what its latents are shifted and scaled, and pipelines differ in what of it they use. So
one is watched while it decodes: what its scheduler made, and what its autoencoder is given for that.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.noise import Sample
from ppcl_toolkit.running.noising import stepping
from ppcl_toolkit.running.record import first_call, split
from ppcl_toolkit.running.rows import as_given

_CLOSE = 2e-2
"""Relative, of latents in bfloat16; without FLUX's shift they differ by 4e-2."""
Scaling = Callable[[Tensor], Tensor]


class _Decoded(BaseException):
    """What is decoded is known, and the image is not wanted: nobody on the way may take it for an error."""


@final
class Encoder:
    """Makes samples of images, for one pipeline, which `run()` calls for an image of any size."""

    def __init__(self, pipeline: Any, adapter: Adapter, run: Callable[[], Any]) -> None:
        """Watch one run.

        Raises `PpclError` where the pipeline makes no single images, or scales their latents in no known way.
        """
        if not hasattr(pipeline, "image_processor"):
            raise PpclError(
                f"samples.images: {type(pipeline).__name__} has no image_processor, as those of videos have none; give "
                "prompts instead"
            )
        self._pipeline, self._adapter = pipeline, adapter
        scalings = list(_scalings(pipeline.vae))
        made, given = _watched(pipeline, run)
        self._frames = given.ndim == 5
        errors = [_error(as_given(self._packed(scaling(given)), made, adapter), made) for scaling in scalings]
        best = min(range(len(errors)), key=lambda number: errors[number])
        if not errors[best] < _CLOSE:
            raise PpclError(
                f"samples.images: {type(pipeline).__name__} does not shift and scale latents as the config of its "
                f"{type(pipeline.vae).__name__} says (they differ by {100 * errors[best]:.3g} %); give prompts instead"
            )
        self._scaling = scalings[best]

    def sample(self, text: str, picture: Image.Image, call: Mapping[str, Any]) -> Sample:
        """Return the sample of a finished image and its caption: nothing is denoised."""
        if call.get("height") and call.get("width"):
            picture = picture.resize((call["width"], call["height"]), Image.Resampling.LANCZOS)
        call = {**call, "height": picture.height, "width": picture.width}
        pipeline = self._pipeline
        if pipeline.vae.config.get("in_channels") == 4:
            picture = picture.convert("RGBA")
        pixels = pipeline.image_processor.preprocess(picture).to(pipeline._execution_device, pipeline.vae.dtype)
        latents = self._packed(self.latents(pixels))
        first = first_call(pipeline, self._adapter, text, 0, call)
        # Under classifier-free guidance in one call, there is a row of the negative prompt, too.
        return next(sample for sample in split(self._adapter, first, latents.cpu()) if not sample.negative)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3 or 4, H, W], and shift and scale their latents [B, C, (1,) h, w]."""
        # Where it convolves over time, too, an image is a video of one frame.
        made = self._pipeline.vae.encode(pixels.unsqueeze(2) if self._frames else pixels)
        return self._scaling(made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent)

    def _packed(self, latents: Tensor) -> Tensor:
        if not self._adapter.packs:
            return latents
        rows, channels, *_, height, width = latents.shape
        packed: Tensor = self._pipeline._pack_latents(latents, rows, channels, height, width)
        return packed


def _scalings(vae: Any) -> Iterator[Scaling]:
    """Yield the ways in which pipelines use what an autoencoder's config says; `PpclError` where it says nothing."""
    names = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    mean, deviation, scale, shift = (vae.config.get(name) for name in names)
    if (mean is None or deviation is None) and scale is None:
        raise PpclError(
            f"samples.images: {type(vae).__name__} has neither scaling_factor nor latents_mean in its config, so its "
            "latents cannot be scaled; give prompts instead"
        )

    def centred(latents: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        center, spread = (torch.tensor(values).view(shape).to(latents) for values in (mean, deviation))
        return (latents - center) / spread

    if mean is not None and deviation is not None:
        yield lambda latents: centred(latents) * (scale or 1.0)
        yield centred
    if scale is not None:
        yield lambda latents: (latents - (shift or 0.0)) * scale
        yield lambda latents: latents * scale


def _watched(pipeline: Any, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Return the latents that the scheduler of a run ends with, and what is decoded of them."""
    made: list[Tensor] = []
    given: list[Tensor] = []

    def decode(latents: Tensor, *_: Any, **__: Any) -> None:
        given.append(latents)
        raise _Decoded

    own = vars(pipeline.vae).get("decode")
    pipeline.vae.decode = decode
    try:
        with stepping(pipeline.scheduler, lambda _, latents: made.append(latents)), contextlib.suppress(_Decoded):
            run()
    finally:
        if own is None:
            del pipeline.vae.decode
        else:
            pipeline.vae.decode = own
    if not made or not given:
        raise PpclError(f"samples.images: {type(pipeline).__name__} decodes nothing by its vae; give prompts instead")
    return made[-1].cpu(), given[0].cpu()


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
