"""Lean optimizers do what the stock ones do, round without a bias, and never learn from what is not finite."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from ppcl_toolkit.recipe import Finetune
from ppcl_toolkit.training.lowbit import joined, packed, plain, round_stochastically, unpacked
from ppcl_toolkit.training.optimizers import make_rule

CPU = torch.device("cpu")
LEAN = ("adamw8bit", "adafactor")


def section(**changes):
    return Finetune(**{"steps": 20, "learning_rate": 1e-2, "clip": None, "weight_decay": 0.1, **changes})


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype)


def loss_of(module, step, scale=1.0):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(next(module.parameters()).dtype)
    return (module(x) - x.flip(-1)).float().square().mean() * scale


def train(module, rule, steps, **options):
    for step in steps:
        assert not rule.update(loss_of(module, step, **options), step, 1e-2, exchange=False)


def test_rounding_is_right_on_the_average_and_hits_neighbours_alone():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, -1.0, 1.001, -1.001, 0.02, 3e-5, -0.0041, 1e-39, 0.0])
    many = torch.stack([round_stochastically(values, generator).float() for _ in range(20_000)])
    # Of 20,000 draws the mean is off by less than five deviations: half a step of bf16 over the root of their number.
    step = (values.abs() * 2.0**-7).clamp(min=2.0**-133)
    assert ((many.double().mean(0) - values.double()).abs() <= 5 * step / 2 / math.sqrt(20_000) + 1e-40).all()
    assert ((many - values).abs() <= step).all()
    exact = torch.randn(100).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), generator), exact)
    assert torch.equal(
        round_stochastically(values, torch.Generator().manual_seed(3)),
        round_stochastically(values, torch.Generator().manual_seed(3)),
    )


@pytest.mark.parametrize("kind", LEAN)
def test_small_steps_are_not_lost_in_bf16(kind):
    """A hundred steps of 1e-5 move a weight by 1e-3; rounded to the nearest, it would never move."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    rule = make_rule(kind, [weight], section(weight_decay=0.0), CPU)
    for step in range(100):
        rule.update((weight.float() * 1.0).sum(), step, 1e-5, exchange=False)
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 1e-3, abs=2e-4)


def test_adafactor_is_the_stock_one():
    ours, stock = network(), network()
    train(ours, make_rule("adafactor", list(ours.parameters()), section(), CPU), range(10))
    options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizer = Adafactor(stock.parameters(), lr=1e-2, weight_decay=0.1, **options)
    for step in range(10):
        loss_of(stock, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_adamw8bit_is_adamw_but_for_its_moments():
    """While no moment is cut to 8 bits, which tensors under 4096 values never are, it is torch's AdamW."""
    torch.manual_seed(0)
    ours = nn.Linear(32, 32)
    stock = copy.deepcopy(ours)
    rule = make_rule("adamw8bit", list(ours.parameters()), section(), CPU)
    adamw = torch.optim.AdamW(stock.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(10):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        rule.update((ours(x) - x.flip(-1)).square().mean(), step, 1e-2, exchange=False)
        (stock(x) - x.flip(-1)).square().mean().backward()
        adamw.step()
        adamw.zero_grad()
    torch.testing.assert_close(ours.weight, stock.weight, rtol=1e-5, atol=1e-6)
    assert rule.state(0)["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_one_by_one_and_moments_are_small(kind, dtype):
    module = network(dtype)
    parameters = list(module.parameters())
    alive = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in parameters))
        )
    rule = make_rule(kind, parameters, section(), CPU)
    train(module, rule, range(2))
    assert max(alive) == 1
    remembered = [value for value in rule.state(0).values() if isinstance(value, torch.Tensor)]
    sizes = sum(part.nbytes for value in remembered for part in packed(value).values())
    # Two codes a value, a scale in 256 of them, and two tables of 256 fp32 values.
    allowed = {"adamw8bit": 8192 * (2 + 2 * 4 / 256) + 2 * 1024, "adafactor": 4 * (64 + 128)}
    assert sizes <= allowed[kind] + 8


@pytest.mark.parametrize("kind", LEAN)
def test_a_gradient_is_clipped_by_its_own_norm(kind):
    """A thousand times the gradient, cut to the same norm: the same weights."""
    weights = []
    for scale in (1e3, 1e6):
        module = network()
        rule = make_rule(kind, list(module.parameters()), section(clip=1e-3), CPU)
        train(module, rule, range(3), scale=scale)
        weights.append(module[0].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", LEAN)
def test_what_is_not_finite_is_not_learned(kind):
    module = network()
    rule = make_rule(kind, list(module.parameters()), section(), CPU)
    train(module, rule, range(2))
    good = {name: value.clone() for name, value in module.state_dict().items()}
    # The root has no slope at zero: a finite loss, and a first gradient that is not finite.
    loss = (module[2].weight * 0).sum().abs().sqrt() + module[0].weight.sum() * 0
    assert rule.update(loss, 2, 1e-2, exchange=False).startswith("the gradient is ")
    assert torch.equal(module[2].weight, good["2.weight"])
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_eight_bit_moments_are_packed_and_joined():
    from torchao.optim.subclass_8bit import OptimState8bit

    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    halves = [OptimState8bit.zeros((32, 256), True, 256).copy_(part) for part in values.chunk(2)]
    again = unpacked(packed(halves[0]))
    assert torch.equal(plain(again), plain(halves[0]))
    assert (again.signed, again.block_size) == (True, 256)
    whole = joined(halves, [slice(None), slice(None)])
    assert type(whole) is OptimState8bit
    # Twice rounded, and no worse than half as much again as once.
    once = (torch.cat([plain(half) for half in halves]) - values).square().mean()
    assert (plain(whole) - values).square().mean() < 1.5**2 * once
    few = joined(halves, [slice(0, 3), slice(0, 0)])
    assert torch.equal(few, plain(halves[0])[:3])


def test_without_torchao_what_is_missing_is_named():
    code = """
import sys
sys.modules["torchao"] = sys.modules["torchao.optim"] = None
import torch
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Finetune
from ppcl_toolkit.training.optimizers import make_rule
try:
    make_rule("adamw8bit", [torch.nn.Parameter(torch.ones(2))], Finetune(), torch.device("cpu"))
except PpclError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs the package torchao: pip install 'ppcl-toolkit[lowmem]'" in done.stdout
