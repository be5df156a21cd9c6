"""Full-size architectures without weights: exact parameter counts of the paper's plans (Eq. 13, 17, 18)."""

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.mechanics.assemble import count_parameters
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun

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


QWEN = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30)]
QWEN += [(42, 43), (45, 47), (48, 49), (52, 53), (54, 55), (56, 57)]


def test_qwen_image_from_20b_to_10b():
    qwen = load_adapter("qwen_image")
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
    call = {
        "hidden_states": torch.empty(1, 4096, 64, device="meta"),
        "encoder_hidden_states": torch.empty(1, 64, 3584, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_shapes": [[(1, 64, 64)]],
        "return_dict": False,
    }
    stack = "transformer_blocks"
    plan = Plan(family="qwen_image", depths=qwen.depths(transformer))
    assert count_parameters(transformer, qwen, plan, call) == 20_430_401_088
    intervals = [Interval(stack=stack, first=u, last=v) for u, v in QWEN]
    plan = plan.with_operations(intervals)
    assert sum(interval.removed for interval in plan.intervals) == 25
    assert count_parameters(transformer, qwen, plan, call) == 11_934_618_688
    runs = [TextRun(stack=stack, reference=r, last=v) for r, v in [(36, 37), (40, 41), (50, 59)]]
    # The published 10B: in a run the text FFN is gone already.
    swaps = [FfnSwap(stack=stack, block=2, streams=("image", "text"))]
    swaps += [FfnSwap(stack=stack, block=b, streams=("image",)) for b in (58, 59)]
    plan = plan.with_operations([*intervals, *runs, *swaps])
    # 10,603,653,184 with the dead text queries and text out-projections that the published weights still carry.
    assert count_parameters(transformer, qwen, plan, call) == 10_452_608_064
