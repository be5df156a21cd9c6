"""How often a streamed teacher is read, held to visits that are counted, and what that takes."""

from collections import Counter
from types import SimpleNamespace

import pytest
from runs import DUAL, batches, desk, plan_of, runner

from ppcl_toolkit.artifacts.storage import Bank
from ppcl_toolkit.budget import Machine, dry_run, reading
from ppcl_toolkit.budget.memory import Memory
from ppcl_toolkit.budget.reading import passes
from ppcl_toolkit.plan import FfnSwap, Interval, TextRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Calibration
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.finetune import record_velocities
from ppcl_toolkit.stages.intervals import find_intervals
from ppcl_toolkit.stages.modulation import find_modulation
from ppcl_toolkit.stages.probe import Probes, probe
from ppcl_toolkit.stages.select import measure
from ppcl_toolkit.stages.width import distill_width

CHUNK = 3
OPERATIONS = (
    Interval(stack=DUAL.path, first=1, last=2),
    TextRun(stack=DUAL.path, reference=1, last=3),
    FfnSwap(stack=DUAL.path, block=3, streams=("image",)),
)
ASKED = """
teacher: {path: black-forest-labs/FLUX.1-dev, chunk: 3}
modulation: {rank: 3, batches: 5, velocity_batches: 2}
probe: {batches: 4, steps: 7}
intervals: {batches: 4, strategy: given, given: [{stack: transformer_blocks, first: 1, last: 2}]}
select: {batches: 2}
depth: {steps: 7}
width: {steps: 5, batches: 4, text_threshold: 0.0}
finetune: {steps: 4}
targets: [{name: it, params: 90%, modulation: true}]
"""


@pytest.fixture
def visits(monkeypatch):
    """Visits of each block."""
    seen, visit = Counter(), Placement.visit

    def counted(self, module, others=()):
        seen[id(module)] += 1
        return visit(self, module, others)

    monkeypatch.setattr(Placement, "visit", counted)
    return seen


def test_passes_are_those_that_are_counted(tmp_path, visits, monkeypatch):
    (tmp_path / "asked.yaml").write_text(ASKED)
    recipe = Recipe.load(tmp_path / "asked.yaml")
    teacher = runner(placement=Placement(streamed=True, chunk=CHUNK))
    plan, noised = plan_of(teacher, *OPERATIONS), batches()
    memory = Memory(recipe, SimpleNamespace(model=SimpleNamespace(forwards=1), params={}), {"it": plan})
    found, wanted = {}, {}
    # Of layers as narrow as these, six ranks are measured.
    monkeypatch.setattr(reading, "RANKS", 7)
    last = id(teacher.blocks(DUAL.path)[2])  # that every pass comes to

    def count(stage):
        found[stage], wanted[stage] = visits.pop(last, 0), passes(memory, stage)

    teacher.reads_last_text(noised[0])
    visits.clear()
    probe(teacher, noised, recipe.probe, desk(tmp_path / "probe"))
    count("probe")
    weights = Probes.load(tmp_path / "probe").weights
    find_intervals(teacher, noised, recipe.intervals, weights, desk(tmp_path / "intervals"))
    count("intervals")
    list(measure(teacher, plan_of(teacher), OPERATIONS, noised, recipe.select.batches))
    count("select")
    distill_depth(teacher, [plan], noised, recipe.depth, desk(tmp_path / "depth"))
    count("depth")
    distill_width(teacher, [plan], Bank(tmp_path / "depth"), noised, recipe.width, desk(tmp_path / "width"))
    count("width")
    record_velocities(teacher, [plan], noised, recipe.finetune, desk(tmp_path / "velocities"))
    count("velocities")
    even = Calibration(batches=batches(uniform=True, guidance=(1.0,)), empty=None, facts={"negative_prompt": None})
    find_modulation(teacher, even, recipe.modulation, desk(tmp_path / "modulation"))
    count("modulation")
    found["modulation"] += 1  # when layers are solved for, their weights come alone
    assert found == wanted


def test_weights_that_the_host_has_no_room_for_take_time():
    recipe = Recipe.load("flux_8b")
    small, large = (dry_run(recipe, machine=Machine(card=24 * 10**9, host=host * 10**9)).hours for host in (32, 512))
    teacher = 2 * 11_901_408_320
    visited = -(-recipe.depth.steps // recipe.teacher.chunk)
    assert small["depth"] - large["depth"] == pytest.approx(visited * teacher / 2e9 / 3600)
    assert small["finetune"] == large["finetune"]
    # On a card that holds it the teacher is read once.
    whole = Machine(card=80 * 10**9, host=32 * 10**9)
    assert dry_run(recipe, machine=whole).hours["depth"] == pytest.approx(large["depth"])
