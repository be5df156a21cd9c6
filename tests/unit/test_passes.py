"""A pass over batches: shared by processes, continued after a kill, and the same result."""

import pytest
import torch
from crowd import together
from runs import FLUX, batches, desk, runner

import ppcl_toolkit.artifacts.passes as passes
from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.passes import Pass
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Probe, Recipe
from ppcl_toolkit.stages import probe as stage
from ppcl_toolkit.stages.intervals import Candidates, detect
from ppcl_toolkit.stages.probe import Probes, probe

COUNTS = (5, 1)
"""Batches: one process gets more than the other, or all."""


class Numbers:
    """A part that adds up the numbers it is given."""

    def __init__(self):
        self.total = torch.zeros(2, dtype=torch.float64)

    def state(self):
        return {"total": self.total}

    def load_state(self, tensors):
        self.total = tensors["total"]


def run(folder, part, count=6, until=99, **options):
    """Add up the numbers of the batches of a pass; return those that were asked for, and what was reported."""
    asked, reported = [], []
    each = Pass("numbers", folder, range(10, 10 + count), {"part": part}, **options)

    def fed(given):
        for done, number in enumerate(given, start=1):
            part.total += number
            asked.append(number)
            yield done

    for done in each.kept(fed(each.of(lambda start, stop: range(start, stop)))):
        reported.append(done)
        if done == until:
            break
    return asked, reported


@pytest.mark.parametrize("until", [1, 4, 6])
def test_a_pass_goes_on_where_it_was_left(tmp_path, monkeypatch, until):
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    assert run(tmp_path, Numbers(), until=until)[1] == list(range(1, until + 1))
    part = Numbers()
    asked, reported = run(tmp_path, part)
    assert asked == list(range(10 + until, 16)) and reported == list(range(until + 1, 7))
    assert part.total.tolist() == [75.0, 75.0]


def test_a_state_is_written_only_after_some_time(tmp_path):
    run(tmp_path, Numbers())
    assert not list(tmp_path.iterdir())


def test_a_state_of_other_sums_is_an_error(tmp_path):
    Pass("numbers", tmp_path, range(3), {"a": Numbers()}).save()
    with pytest.raises(PpclError, match="other sums"):
        Pass("numbers", tmp_path, range(3), {"b": Numbers()})


def detected(folder, count):
    """Run both stages of detection in `folder`."""
    run = runner(dual=2, single=2)
    target = {"name": "half", "params": "50%"}
    recipe = {"teacher": {"path": "x"}, "intervals": {"batches": count}, "targets": [target]}
    probe(run, batches(), Probe(batches=count, ridge=1e-3, steps=2), desk(folder / "probe"))
    processes.wait()
    weights = Probes.load(folder / "probe").weights
    detect(run, batches(seed=8), weights, Recipe.model_validate(recipe), desk(folder / "intervals"))
    processes.wait()


def one_of_two(rank, folder):
    part = Numbers()
    asked, reported = run(folder, part, count=5)
    assert (asked, reported) == (([10, 12, 14], [2, 4, 5]), ([11, 13], [2, 4]))[rank]
    each = Pass("numbers", folder, range(5), {"part": part})
    each.add_up(torch.device("cpu"))
    assert part.total.tolist() == [60.0, 60.0]
    assert run(folder, Numbers(), sliced=True)[0] == list(range(10, 16))
    own, trained = stage.ProbeTrainer, []
    stage.ProbeTrainer = lambda stack, block, *more: trained.append(f"{stack.path}.{block}") or own(stack, block, *more)
    for count in COUNTS:
        detected(folder / str(count), count)
    blocks = [f"{stack.path}.{block}" for stack in FLUX.stacks for block in range(2)]
    assert trained == (blocks[:2], blocks[2:])[rank] * len(COUNTS)


def test_two_processes_find_what_one_finds(tmp_path):
    (tmp_path / "two").mkdir()
    together(2, one_of_two, tmp_path / "two")
    for count in COUNTS:
        detected(tmp_path / "one" / str(count), count)
        one, two = (tmp_path / kind / str(count) for kind in ("one", "two"))
        for made in ("probe", "intervals"):
            assert sorted(p.name for p in (one / made).iterdir()) == sorted(p.name for p in (two / made).iterdir())
        alone, shared = Probes.load(one / "probe"), Probes.load(two / "probe")
        assert shared.weights.keys() == alone.weights.keys()
        assert all(torch.equal(shared.weights[key], weight) for key, weight in alone.weights.items())
        assert shared.unexplained == alone.unexplained
        expected, found = Candidates.load(one / "intervals"), Candidates.load(two / "intervals")
        assert (found.intervals, found.text_runs) == (expected.intervals, expected.text_runs)
        for stack in FLUX.stacks:
            for stream, curves in expected.curves[stack.path].items():
                for a, b in zip(curves, found.curves[stack.path][stream], strict=True):
                    torch.testing.assert_close(b, a, rtol=0, atol=1e-7)
