"""The optimizer step is a plain AdamW loop, goes on bit by bit where it was stopped, and stops before a NaN."""

import copy
import math

import pytest
import torch
from torch import nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.processes import pick_device
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.training.loop import Optimization, autocast, learning_rate, load_state, save_state

SECTION = Depth(steps=20, learning_rate=0.01, warmup=4, clip=0.1, weight_decay=0.1)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


def loss_of(module, step):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    return (module(x) - x.flip(-1)).square().mean() * 10


def train(module, optimization, steps):
    for step in steps:
        optimization.step(loss_of(module, step))


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def pair(*seeds):
    modules = {name: model(seed) for name, seed in zip("ab", seeds, strict=True)}
    return {name: (module, Optimization(name, [module], SECTION)) for name, module in modules.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("clip", [0.1, None])
def test_it_is_a_plain_adamw_loop(clip):
    section = SECTION.model_copy(update={"clip": clip})
    ours, plain = model(), model()
    optimization = Optimization("it", [ours], section)
    train(ours, optimization, range(20))

    adamw = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    values = []
    for step in range(20):
        # Warm-up takes at most a tenth of all steps.
        rate = 0.01 * min((step + 1) / 2, 0.5 * (1 + math.cos(math.pi * max(step - 2, 0) / 18)))
        for group in adamw.param_groups:
            group["lr"] = rate
        loss = loss_of(plain, step)
        values.append(float(loss.detach()))
        adamw.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        adamw.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)
    assert [step for step, _ in optimization.losses] == list(range(1, 21))
    assert [value for _, value in optimization.losses] == pytest.approx(values)
    assert optimization.done == 20


def test_the_learning_rate_warms_up_and_decays_to_zero():
    section = Depth(steps=100, warmup=10, learning_rate=2.0)
    rates = [learning_rate(step, section) for step in range(101)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(one >= other for one, other in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(0, Depth(steps=1, warmup=20, learning_rate=1.0)) == 1.0
    assert learning_rate(0, Depth(steps=5, warmup=0, learning_rate=1.0)) == 1.0


@pytest.mark.parametrize("stopped_at", [1, 7, 19])
def test_resumed_equals_uninterrupted_bit_by_bit(tmp_path, stopped_at):
    parts = pair(0, 1)
    for module, optimization in parts.values():
        train(module, optimization, range(20))

    first = {
        name: (module, Optimization(name, [module], SECTION)) for name, module in {"a": model(0), "b": model(1)}.items()
    }
    for module, optimization in first.values():
        train(module, optimization, range(stopped_at))
    save_state(tmp_path / "state", stopped_at, first)
    second = pair(5, 6)
    assert load_state(tmp_path / "state", second) == stopped_at
    for name, (module, optimization) in second.items():
        train(module, optimization, range(stopped_at, 20))
        assert equal(weights(module), weights(parts[name][0]))
        assert optimization.losses == parts[name][1].losses
        assert optimization.done == 20


def test_a_state_is_found_or_not_and_never_mistaken(tmp_path):
    module = model()
    assert load_state(tmp_path / "none", {"a": (module, Optimization("a", [module], SECTION))}) == 0
    save_state(tmp_path / "state", 0, {"a": (module, Optimization("a", [module], SECTION))})
    with pytest.raises(PpclError, match="state holds other segments than this run trains; delete it"):
        load_state(tmp_path / "state", {"b": (module, Optimization("b", [module], SECTION))})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_it_at_the_last_good_state(bad):
    module = model()
    optimization = Optimization("blocks.0-2", [module], SECTION)
    train(module, optimization, range(3))
    good = weights(module)
    optimization.step(loss_of(module, 3) * bad)
    assert optimization.stopped == f"blocks.0-2 stopped at step 4: the loss is {bad}; its last good state is kept"
    assert equal(weights(module), good)
    assert (optimization.done, len(optimization.losses)) == (3, 3)


def test_a_gradient_that_is_not_finite_stops_it_at_the_last_good_state():
    module = model()
    optimization = Optimization("blocks.0-2", [module], SECTION)
    train(module, optimization, range(3))
    good = weights(module)
    # The root has no slope at zero: a finite loss, an infinite gradient.
    optimization.step((module[0].weight * 0).sum().abs().sqrt())
    assert "blocks.0-2 stopped at step 4: the gradient is" in optimization.stopped
    assert equal(weights(module), good)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_has_stopped_stays_stopped(tmp_path):
    module = model()
    optimization = Optimization("a", [module], SECTION)
    optimization.step(loss_of(module, 0) * math.nan)
    save_state(tmp_path / "state", 1, {"a": (module, optimization)})
    again = Optimization("a", [module], SECTION)
    load_state(tmp_path / "state", {"a": (module, again)})
    assert again.stopped == optimization.stopped


def test_frozen_parameters_stay():
    module = model()
    module[0].requires_grad_(False)
    before = copy.deepcopy(module[0].state_dict())
    train(module, Optimization("a", [module], SECTION), range(3))
    assert equal(module[0].state_dict(), before)


def test_moments_move_and_come_back():
    module = model()
    optimization = Optimization("a", [module], SECTION)
    train(module, optimization, range(2))
    before = optimization.state()["moments"]["0"]["exp_avg"]
    optimization.place(lambda _, tensor: tensor.to("meta"))
    moments = optimization.state()["moments"]["0"]
    assert moments["exp_avg"].device.type == moments["exp_avg_sq"].device.type == "meta"
    assert moments["step"].device.type == "cpu"
    fresh = Optimization("a", [module], SECTION)
    train(module, fresh, range(2))
    fresh.place(lambda _, tensor: tensor.to("cpu"))
    assert fresh.state()["moments"]["0"]["exp_avg"].shape == before.shape


def test_precision_is_mixed_where_the_teacher_is_in_half():
    x = torch.ones(2, 2)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda" if not torch.cuda.is_available() else "tpu"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(PpclError, match="device: "):
        pick_device(name)
    assert pick_device("cpu").type == "cpu"
