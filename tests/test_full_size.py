"""Full-size architectures without weights: exact parameter counts of the paper's plans (Eq. 17, 18)."""

import torch
from diffusers import FluxTransformer2DModel

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.mechanics.assemble import count_parameters
from ppcl_toolkit.plan import Interval, Plan

DUAL = [(3, 5), (6, 8), (9, 11), (12, 14), (15, 16), (17, 18)]
SINGLE = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13)]
SINGLE += [(18, 19), (20, 21), (22, 23), (24, 25), (26, 27), (28, 29), (30, 31)]


def flux_call():
    """An example call of FLUX.1-dev at 1024 x 1024, without data."""
    shapes = {
        "hidden_states": (1, 4096, 64),
        "encoder_hidden_states": (1, 512, 4096),
        "pooled_projections": (1, 768),
        "timestep": (1,),
        "guidance": (1,),
        "img_ids": (4096, 3),
        "txt_ids": (512, 3),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()} | {"return_dict": False}


def test_flux_dev_and_all_of_the_papers_intervals():
    flux = load_adapter("flux")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    empty = Plan(family="flux", depths=flux.depths(transformer))
    assert count_parameters(transformer, flux, empty, flux_call()) == 11_901_408_320
    intervals = [Interval(stack="transformer_blocks", first=u, last=v) for u, v in DUAL]
    intervals += [Interval(stack="single_transformer_blocks", first=u, last=v) for u, v in SINGLE]
    plan = empty.with_operations(intervals)
    assert sum(interval.removed for interval in plan.intervals) == 10 + 14
    assert count_parameters(transformer, flux, plan, flux_call()) == 6_520_810_048


def test_flux_lite():
    flux = load_adapter("flux")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True, num_layers=8)
    empty = Plan(family="flux", depths=flux.depths(transformer))
    assert count_parameters(transformer, flux, empty, flux_call()) == 8_163_264_064
