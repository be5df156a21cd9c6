"""Probes and similarities on a GPU; `test_pretend_detection.py` starts a process that has one."""

import pytest
import torch
from runs import FLUX, batches, desk, plan_of, runner

from ppcl_toolkit.artifacts import passes
from ppcl_toolkit.plan import FfnSwap, Interval
from ppcl_toolkit.recipe import Depth, Intervals, Probe
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.stages import probe as stage
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.intervals import find_intervals
from ppcl_toolkit.stages.probe import fit_probes
from ppcl_toolkit.statistics.chains import ChainedCka
from ppcl_toolkit.statistics.moments import Moments
from ppcl_toolkit.training.substitution import measure, measure_together

CARD = torch.device("cuda", 0)
WAYS = {"resident": Placement(device=CARD), "streamed": Placement(device=CARD, streamed=True, chunk=2)}
CARDS = {"fp64 is fast": (8, 0), "fp64 crawls": (8, 9)}


def fitted(folder, placement=None, steps=2):
    run, settings, work = runner(2, 2, placement), Probe(batches=3, ridge=1e-3, steps=steps), desk(folder)
    return fit_probes(run, batches(), settings, work)


@pytest.mark.parametrize("capability", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("placement", WAYS.values(), ids=WAYS)
def test_probes_are_the_hosts(tmp_path, monkeypatch, placement, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    found, expected = fitted(tmp_path / "card", placement), fitted(tmp_path / "host")
    assert found.weights.keys() == expected.weights.keys()
    for key, weight in expected.weights.items():
        assert found.weights[key].device.type == "cpu"
        torch.testing.assert_close(found.weights[key], weight, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))
        assert found.unexplained[key] == pytest.approx(expected.unexplained[key], abs=1e-5)


@pytest.mark.parametrize("capability", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("at_rest", ["cpu", "cuda"])
def test_sums_are_the_hosts_wherever_they_rest(monkeypatch, at_rest, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    x = torch.randn(2, 700, 16)
    y = x + 0.1 * torch.randn(2, 700, 16)
    expected, found = Moments.zeros(16), Moments.zeros(16, at_rest)
    expected.add(x, y)
    found.add(x.to(CARD), y.to(CARD))
    for name, total in expected.tensors().items():
        assert found.tensors()[name].device.type == at_rest
        torch.testing.assert_close(found.tensors()[name].cpu(), total, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("placement", WAYS.values(), ids=WAYS)
def test_sums_and_trainers_wait_on_the_host(tmp_path, monkeypatch, placement):
    seen = []

    class Watched(stage.ProbeTrainer):
        def read(self, reading):
            super().read(reading)
            seen.append({value.device.type for value in self.state().values() if value.ndim})

    monkeypatch.setattr(stage, "ProbeTrainer", Watched)
    fitted(tmp_path, placement)
    assert seen and all(devices == ({"cuda"} if placement.streamed else {"cpu"}) for devices in seen)


@pytest.mark.parametrize("placement", WAYS.values(), ids=WAYS)
def test_sums_of_the_stage_wait_on_the_host(tmp_path, monkeypatch, placement):
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    places = []
    monkeypatch.setattr(passes, "save_tree", lambda _, tree: places.append(tree["parts"]))
    fitted(tmp_path, placement, steps=0)
    sums = [total for parts in places for part in parts.values() for total in part.values()]
    assert sums and {total.device.type for total in sums} == {"cpu"}


@pytest.mark.parametrize("placement", WAYS.values(), ids=WAYS)
def test_errors_of_several_operations_together_are_the_hosts(placement):
    """An interval whose first block has linear FFNs, and another interval."""
    interval, other = (Interval(stack=stack.path, first=0, last=1) for stack in FLUX.stacks)
    operations = [interval, FfnSwap(stack=interval.stack, block=0, streams=("image", "text")), other]
    (error, without), (expected, expected_without) = (
        measure_together(run, plan_of(run), operations, batches(size=4), 2)
        for run in (runner(3, 2, placement), runner(3, 2))
    )
    assert error == pytest.approx(expected, rel=1e-3) and without == pytest.approx(expected_without, rel=1e-3)
    assert len({error, *without}) == 4


def test_a_streamed_teacher_is_in_its_memory_when_candidates_and_starts_are_measured(tmp_path):
    """Pages of files, as a rule: a copy would be memory that nobody has planned."""
    run = runner(3, 2, WAYS["streamed"])
    before = [parameter.data_ptr() for parameter in run.transformer.parameters()]
    plan = plan_of(run, *(Interval(stack=stack.path, first=0, last=1) for stack in FLUX.stacks))
    for _ in measure(run, plan_of(run), plan.operations, batches(), 1):
        pass
    distill_depth(run, [plan], batches(), Depth(steps=1, batch=2, init="best"), desk(tmp_path))
    run.leave()
    assert [parameter.data_ptr() for parameter in run.transformer.parameters()] == before


@pytest.mark.parametrize("placement", WAYS.values(), ids=WAYS)
def test_similarities_are_the_hosts(tmp_path, placement):
    weights = fitted(tmp_path / "host", steps=0).weights
    found, expected = (
        find_intervals(runner(2, 2, each), batches(), Intervals(batches=3), weights, desk(tmp_path / name))
        for name, each in (("card", placement), ("cpu", None))
    )
    assert found.intervals == expected.intervals
    for stack in FLUX.stacks:
        for stream, curves in expected.curves[stack.path].items():
            for a, b in zip(curves, found.curves[stack.path][stream], strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_a_chunk_of_batches_and_a_deep_stack_take_no_more_of_the_device():
    def peak(depth, samples):
        sums = ChainedCka([None, *(torch.zeros(64, 64) for _ in range(depth - 1))])
        output = torch.randn(1, 80, 64, device=CARD)
        torch.cuda.reset_peak_memory_stats(CARD)
        before = torch.cuda.memory_allocated(CARD)
        for _ in range(samples):
            sums.observe(0, output)
        sums.follow(0)
        assert torch.cuda.memory_allocated(CARD) <= before
        return torch.cuda.max_memory_allocated(CARD) - before

    few = peak(4, 16)
    assert few > 16 * 2 * 64 * 64 * 4
    assert peak(12, 16) < 1.1 * few and peak(4, 80) < 1.1 * few
