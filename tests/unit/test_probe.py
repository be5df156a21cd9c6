import tempfile
from pathlib import Path

import pytest
import torch
from tiny import flux_inputs, flux_transformer
from torch import nn

import ppcl_toolkit.artifacts.passes as passes
from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Probe
from ppcl_toolkit.running.capture import Streams, bind, unpack
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Reading, Runner
from ppcl_toolkit.stages.probe import ProbeReader, Probes, ProbeTrainer, fit_probes, probe

FLUX = load_adapter("flux")
DUAL, SINGLE = FLUX.stacks
LINEAR = 2


def fit(runner, batches, settings, folder=None, progress=lambda *_: None):
    """All that the stage does on one process."""
    with tempfile.TemporaryDirectory() as own:
        desk = Desk(folder or Path(own), progress)
        return fit_probes(runner, batches, settings, desk)


def batches(start, stop):
    for step in range(start, stop):
        yield flux_inputs(batch=2, seed=step)


def linear_flux():
    """A FLUX whose block 2 computes x + A x in both streams, by its own forward."""
    transformer = flux_transformer(dual=3, single=1)
    block = transformer.transformer_blocks[LINEAR]
    for norm in (block.norm1, block.norm1_context):
        nn.init.zeros_(norm.linear.weight)
        # The six chunks are shift, scale and gate of the attention, then of the FFN: only the FFN's gate is open.
        norm.linear.bias.data = torch.cat([torch.zeros(5 * 32), torch.ones(32)])
    block.norm2, block.norm2_context = nn.Identity(), nn.Identity()
    torch.manual_seed(1)
    block.ff, block.ff_context = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    return transformer, {"image": block.ff.weight.detach(), "text": block.ff_context.weight.detach()}


def oracle(transformer, stack, block, step):
    """Streams into and out of a block, by plain hooks in a whole forward pass."""
    seen = []
    module = stack.blocks(transformer)[block]
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: seen.extend([bind(m, stack, args, kwargs)[1], unpack(stack, out)]),
        with_kwargs=True,
    )
    with torch.no_grad():
        transformer(**next(iter(batches(step, step + 1))))
    handle.remove()
    return seen


def reading(x, update_weight):
    x = Streams(x, 2 * x)
    return Reading({}, x, Streams(*(stream + stream @ update_weight.T for stream in x)))


def test_a_block_that_is_linear_is_recovered():
    transformer, truth = linear_flux()
    probes = fit(Runner(transformer, FLUX), batches, Probe(batches=12, ridge=1e-12))
    for stream, weight in truth.items():
        key = (DUAL.path, LINEAR, stream)
        torch.testing.assert_close(probes.weights[key], weight, atol=2e-3, rtol=0)
        assert probes.unexplained[key] < 1e-8
    assert probes.unexplained[DUAL.path, 1, "image"] > 1e-4


def test_every_block_and_stream_has_equation_1():
    transformer = flux_transformer(dual=2, single=2)
    probes = fit(Runner(transformer, FLUX), batches, Probe(batches=3, ridge=1e-3))
    assert set(probes.weights) == set(probes.unexplained)
    assert len(probes.weights) == 4 * 2 - 1
    for stack in FLUX.stacks:
        for block in range(2):
            seen = [oracle(transformer, stack, block, step) for step in range(3)]
            # Nobody reads the text behind the last block.
            for stream in ("image", "text") if (stack, block) != (SINGLE, 1) else ("image",):
                x = torch.cat([getattr(s[0], stream).flatten(0, 1) for s in seen]).double()
                y = torch.cat([getattr(s[1], stream).flatten(0, 1) for s in seen]).double()
                ridge = 1e-3 * (x - x.mean(0)).square().sum(0).diag()
                expected = (y - x).T @ x @ torch.linalg.inv(x.T @ x + ridge)
                found = probes.weights[stack.path, block, stream]
                torch.testing.assert_close(found, expected.float(), atol=1e-3, rtol=1e-3)
                left = (y - x - x @ expected.T).square().sum() / (y - x).square().sum()
                assert probes.unexplained[stack.path, block, stream] == pytest.approx(float(left), abs=1e-5)


def test_streamed_and_resident_fits_are_the_same_bits():
    transformer = flux_transformer(dual=2, single=1)
    settings = Probe(batches=4, ridge=1e-3, steps=3, learning_rate=1e-3)
    resident = fit(Runner(transformer, FLUX), batches, settings)
    streamed = Runner(transformer, FLUX, Placement(chunk=3, streamed=True))
    other = fit(streamed, batches, settings)
    assert other.unexplained == resident.unexplained
    assert all(torch.equal(other.weights[key], weight) for key, weight in resident.weights.items())


def test_training_starts_from_equation_1_and_takes_fresh_batches():
    transformer = flux_transformer(dual=1, single=1)
    asked = []

    def recorded(start, stop):
        asked.append((start, stop))
        return batches(start, stop)

    closed = fit(Runner(transformer, FLUX), batches, Probe(batches=3, ridge=1e-3))
    settings = Probe(batches=3, ridge=1e-3, steps=2, learning_rate=1e-5)
    trained = fit(Runner(transformer, FLUX), recorded, settings)
    # Behind the example by which slices are balanced.
    assert [number for start, stop in asked[1:] for number in range(start, stop)] == list(range(5))
    for key, weight in closed.weights.items():
        moved = (trained.weights[key] - weight).abs().max()
        assert 0 < moved < 3e-5
        assert not trained.weights[key].requires_grad


def test_a_step_is_adamw_on_equation_2():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    start = torch.full((4, 4), 0.1)
    trainer = ProbeTrainer(DUAL, 0, {"image": start, "text": start}, 0.01)
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        ((x @ weight.T + x - 2 * x) ** 2).sum(-1).mean().backward()
        optimizer.step()
        trainer.read(reading(x, torch.eye(4)))
    torch.testing.assert_close(trainer.weights["image"], weight)
    # The text's error is four times as large, which AdamW does not see.
    torch.testing.assert_close(trainer.weights["text"], weight, atol=1e-6, rtol=0)


def test_training_alone_finds_a_linear_update():
    g = torch.Generator().manual_seed(0)
    truth = 0.1 * torch.randn(4, 4, generator=g)
    trainer = ProbeTrainer(DUAL, 0, {"image": torch.zeros(4, 4), "text": torch.zeros(4, 4)}, 0.003)
    trainer.place(torch.device("cpu"))
    for _ in range(300):
        trainer.read(reading(torch.randn(2, 8, 4, generator=g), truth))
    trainer.place(torch.device("cpu"))
    torch.testing.assert_close(trainer.weights["image"].detach(), truth, atol=0.01, rtol=0)


def test_a_stream_that_a_block_does_not_return_has_no_probe():
    reader = ProbeReader(DUAL, 0)
    x = torch.randn(1, 4, 3)
    reader.read(Reading({}, Streams(x, x), Streams(x)))
    assert list(reader.moments) == ["image"]


def test_too_few_tokens_are_an_error():
    with pytest.raises(PpclError, match="take more tokens"):
        fit(Runner(flux_transformer(dual=1, single=1), FLUX), batches, Probe(batches=1, ridge=1e-300))


def test_saved_is_loaded(tmp_path):
    probes = fit(Runner(flux_transformer(dual=1, single=1), FLUX), batches, Probe(batches=2, ridge=1e-3))
    probes.save(tmp_path)
    loaded = Probes.load(tmp_path)
    assert loaded.unexplained == probes.unexplained
    assert list(loaded.unexplained) == list(probes.unexplained)
    assert set(loaded.weights) == set(probes.weights)
    assert all(torch.equal(loaded.weights[key], weight) for key, weight in probes.weights.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("at", [1, 3, 4, 6, 7])
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path, monkeypatch, at, streamed):
    transformer = flux_transformer(dual=2, single=1)
    settings = Probe(batches=4, ridge=1e-3, steps=4, learning_rate=1e-3)
    runner = Runner(transformer, FLUX, Placement(chunk=2 if streamed else 1, streamed=streamed))
    whole = fit(runner, batches, settings)
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    asked = []

    def recorded(start, stop):
        asked.append(start)
        return batches(start, stop)

    def kill(done, _):
        if done >= at:
            raise Killed

    with pytest.raises(Killed):
        probe(runner, recorded, settings, Desk(tmp_path, kill))
    first = len(asked)
    probe(runner, recorded, settings, Desk(tmp_path, lambda *_: None))
    # Nothing is done twice: the very first of each run is the example by which slices are balanced.
    assert sorted([*asked[1:first], *asked[first + 1 :]]) == list(range(8))
    found = Probes.load(tmp_path)
    assert found.unexplained == whole.unexplained
    assert all(torch.equal(found.weights[key], weight) for key, weight in whole.weights.items())
    assert [path.name for path in tmp_path.iterdir()] == ["probes.safetensors"]


def test_a_short_fit_leaves_no_state_on_its_way(tmp_path):
    seen = []
    settings = Probe(batches=3, ridge=1e-3)
    fit(Runner(flux_transformer(dual=1, single=1), FLUX), batches, settings, tmp_path, lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)] and not list(tmp_path.iterdir())
