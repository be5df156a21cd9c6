"""How a pipeline noises is seen from its steps: of real schedulers, of every family, and what cannot be noised for."""

import dataclasses

import numpy as np
import pytest
import strangers
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from families import FLUX, SD3
from runs import batches

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.images import run_pipeline
from ppcl_toolkit.running.noising import Noising, Step, check_negatives, noising_of, observed
from ppcl_toolkit.running.record import denoised

CALL = {"height": 8, "width": 8, "num_inference_steps": 4, "max_sequence_length": 8}


def steps_of(scheduler, told, dtype=torch.float32, count=3):
    """Steps of a scheduler of its own, in which a transformer is told `told(timestep, sigma)`."""
    if scheduler.config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.7)
    else:
        scheduler.set_timesteps(4)
    sigmas = getattr(scheduler, "sigmas", torch.zeros(5))
    found = []
    for t, sigma in list(zip(scheduler.timesteps, sigmas, strict=False))[:count]:
        sample = torch.randn(1, 9, 4)
        told_of = torch.as_tensor(told(t, sigma)).to(dtype).repeat(2)
        call = {"hidden_states": sample.to(dtype), "timestep": told_of, "img_ids": torch.zeros(9, 3)}
        found.append(Step(call=call, timestep=float(t), sample=sample, made=sample))
    return found


FLOWS = (
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
)
TOLD = {
    "sigma": (lambda t, _: t / 1000, (0.0, 1.0)),
    "timestep": (lambda t, _: t, (0.0, 1000.0)),
    "reversed": (lambda t, _: 1 - t / 1000, (1.0, -1.0)),
    "another": (lambda _, s: 3 * s - 0.5, (-0.5, 3.0)),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("sigma", "timestep", "reversed"))
@pytest.mark.parametrize("scheduler", FLOWS[:3], ids=lambda s: str(dict(s.config))[:40])
def test_how_a_flow_is_told_is_seen(scheduler, name, dtype):
    told, (offset, scale) = TOLD[name]
    assert noising_of(scheduler, FLUX, steps_of(scheduler, told, dtype)) == Noising(offset=offset, scale=scale)


def test_any_affine_map_will_do():
    told, (offset, scale) = TOLD["another"]
    found = noising_of(FLOWS[1], FLUX, steps_of(FLOWS[1], told))
    assert (found.offset, found.scale) == (offset, scale)
    levels = torch.rand(5)
    assert torch.allclose(found.level(found.told(levels)), levels, atol=1e-6)


def test_sigmas_that_count_what_is_left_are_turned_round():
    """Mochi's scheduler begins at 0, where latents are noise alone."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    found = noising_of(scheduler, FLUX, steps_of(scheduler, lambda t, _: t))
    assert scheduler.sigmas[0] == 0 and found.told(torch.ones(1)).item() == 0
    assert (found.offset, found.scale) == (1000.0, -1000.0)
    assert torch.equal(found.noised(torch.zeros(1), torch.ones(1), found.level(torch.zeros(1))), torch.ones(1))


def test_a_solver_of_another_name_may_follow_a_flow():
    scheduler = FLOWS[3]
    assert noising_of(scheduler, FLUX, steps_of(scheduler, lambda t, _: t)).kind == "flow"


@pytest.mark.parametrize("told", (lambda _, s: s**2, lambda _, s: s.sqrt() * 1000, lambda *_: 0.0))
def test_other_maps_are_refused(told):
    with pytest.raises(PpclError, match="no affine map of the level of noise of FlowMatchEulerDiscreteScheduler"):
        noising_of(FLOWS[1], FLUX, steps_of(FLOWS[1], told))


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
@pytest.mark.parametrize("kind", (DDPMScheduler, DDIMScheduler))
def test_diffusion_is_noised_as_its_scheduler_does(kind, prediction):
    scheduler = kind(prediction_type=prediction)
    found = noising_of(scheduler, FLUX, steps_of(scheduler, lambda t, _: t))
    assert found.kind == "diffusion" and len(found.signal) == 1000
    clean, noise, levels = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.5, 1.0])
    told = found.told(levels)
    assert told.tolist() == [0, 500, 999]
    assert torch.allclose(found.noised(clean, noise, levels), scheduler.add_noise(clean, noise, told.long()), atol=1e-6)
    assert torch.allclose(found.level(told), levels, atol=1e-3)


def test_what_cannot_be_noised_for_is_refused_by_name():
    scheduler = EulerDiscreteScheduler()
    with pytest.raises(PpclError, match=r"EulerDiscreteScheduler \(prediction_type 'epsilon'\) cannot be noised for"):
        noising_of(scheduler, FLUX, steps_of(scheduler, lambda t, _: t))
    ddpm = DDPMScheduler()
    with pytest.raises(PpclError, match="is told .* where DDPMScheduler is at step"):
        noising_of(ddpm, FLUX, steps_of(ddpm, lambda t, _: t / 1000))


def test_latents_that_are_not_the_schedulers_are_refused():
    steps = steps_of(FLOWS[0], lambda t, _: t)
    scaled = [dataclasses.replace(step, sample=2 * step.sample) for step in steps]
    with pytest.raises(PpclError, match="are not the latents that the scheduler steps"):
        noising_of(FLOWS[0], FLUX, scaled)
    shaped = [dataclasses.replace(step, sample=step.sample[..., :2]) for step in steps]
    with pytest.raises(PpclError, match=r"clean latents are \[1, 9, 2\], and the pipeline passes .* of \[1, 9, 4"):
        noising_of(FLOWS[0], FLUX, shaped)
    mixed = [dataclasses.replace(s, call={**s.call, "timestep": torch.tensor([0.1, 0.2])}) for s in steps]
    with pytest.raises(PpclError, match="differs within one call"):
        noising_of(FLOWS[0], FLUX, mixed)


@pytest.mark.parametrize("count", (1, 3))
def test_a_real_run_is_cut_short(count):
    pipeline = tiny.flux_pipeline()
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    steps = observed(pipeline, FLUX, lambda: run_pipeline(pipeline, ["a"], None, CALL, "latent"), count)
    assert len(steps) == len(calls) == count
    assert steps[0].timestep == 1000 and torch.equal(steps[0].call["hidden_states"], steps[0].sample)
    assert "step" not in vars(pipeline.scheduler) and noising_of(pipeline.scheduler, FLUX, steps) == Noising()


def test_wrong_names_are_said():
    pipeline = tiny.flux_pipeline()
    with pytest.raises(PpclError, match="without 'sigma', but with hidden_states"):
        run = dataclasses.replace(FLUX, timestep="sigma")
        observed(pipeline, run, lambda: run_pipeline(pipeline, ["a"], None, CALL, "latent"))
    with pytest.raises(PpclError, match="takes no step of its scheduler"):
        observed(pipeline, FLUX, lambda: None)


def test_a_reversed_teacher_is_told_reversed():
    plain, turned = batches(), batches(noising=Noising(offset=1.0, scale=-1.0))
    for one, other in zip(plain(0, 3), turned(0, 3), strict=True):
        assert torch.equal(one["hidden_states"], other["hidden_states"])
        assert torch.allclose(other["timestep"], 1 - one["timestep"])


def test_sd3_is_told_a_thousand_times_sigma():
    pipeline = tiny.sd3_pipeline()
    call = {**CALL, "guidance_scale": 3.0}
    steps = observed(pipeline, SD3, lambda: run_pipeline(pipeline, ["a"], None, call, "latent"))
    assert noising_of(pipeline.scheduler, SD3, steps) == Noising(scale=1000.0)


GUIDED = {
    "sd3": (tiny.sd3_pipeline, SD3, {**CALL, "guidance_scale": 3.0}),
    "z_image": (strangers.z_image_pipeline, load_adapter("z_image"), {**CALL, "guidance_scale": 3.0}),
}


@pytest.mark.parametrize("family", GUIDED)
def test_where_negatives_are_is_seen(family):
    """SD3's pipeline puts them before the prompts, Z-Image's behind."""
    build, adapter, call = GUIDED[family]
    pipeline = build()
    steps = [
        observed(pipeline, adapter, lambda text=text: run_pipeline(pipeline, [text], seeds(), call, "latent"), 1)[0]
        for text in ("a circle", "something else")
    ]
    assert len(steps[0].call[adapter.latents]) == 2 * len(steps[0].sample)
    check_negatives(*steps, adapter)
    wrong = dataclasses.replace(adapter, negatives_last=not adapter.negatives_last)
    with pytest.raises(PpclError, match="of 2 rows of a call, .* belong to the prompts, and negatives_last is"):
        check_negatives(*steps, wrong)
    samples = denoised(pipeline, adapter, ["a circle"], call, 0)
    assert [sample.negative for sample in samples] == ([False, True] if family == "z_image" else [True, False])


def seeds():
    return [torch.Generator().manual_seed(0)]
