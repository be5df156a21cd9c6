"""Modulation of low rank on every family's own samples: proved, recorded, factored, and as good as the curve says."""

import json

import pytest
import torch
from runs import desk

from ppcl_toolkit.artifacts.storage import Bank
from ppcl_toolkit.recipe import Modulation
from ppcl_toolkit.running.capture import predict
from ppcl_toolkit.running.noise import Calibration
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.modulation import LowRankChoice, find_modulation
from ppcl_toolkit.surgery.assemble import student_of

SECTION = Modulation(rank=3, batches=8, batch=2, velocity_batches=2)


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_a_student_is_what_the_curve_says(world, streamed, tmp_path):
    adapter, teacher = world.adapter, world.teacher.transformer
    batches = Calibration(batches=world.batches(uniform=True), facts={"negative_prompt": None})
    runner = Runner(teacher, adapter, Placement(streamed=streamed))
    find_modulation(runner, batches, SECTION, desk(tmp_path / "modulation"))
    low = LowRankChoice.load(tmp_path / "modulation")
    assert [swap.stack for swap in low.swaps] == [stack.path for stack in adapter.stacks]
    plan = world.teacher.plan().with_operations(low.swaps)
    student = student_of(teacher, adapter, plan, Bank(tmp_path / "modulation"), batches[0])
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    wrong = energy = 0.0
    with torch.no_grad():
        for batch in batches(8, 10):
            expected, found = (predict(model, adapter, batch).double() for model in (teacher, student))
            wrong, energy = wrong + (found - expected).square().sum(), energy + expected.square().sum()
    assert (wrong / energy).sqrt().item() == pytest.approx(low.curve[3], rel=1e-3, abs=1e-6)
    assert low.curve[16] < low.curve[1]
    told = json.loads((tmp_path / "modulation/curve.json").read_text())["covered"]
    # FLUX is told its guidance, at which it was recorded.
    assert bool(told["guidance"]) == ("flux" in world.name)
