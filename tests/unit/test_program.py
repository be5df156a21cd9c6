"""Selection by an integer program, against all subsets that there are."""

import contextlib
import itertools
import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import DUAL, SINGLE, batches, desk, identity, plan_of, runner

from ppcl_toolkit.budget.memory import Memory
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, TextRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.choice import Choice, Goal
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.selection.joint import ROUNDS, choose_by_program
from ppcl_toolkit.selection.program import Program
from ppcl_toolkit.stages import select as stage
from ppcl_toolkit.stages.select import select
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Measured, measure, measure_together

INTERVALS = [
    Interval(stack=DUAL.path, first=first, last=last) for first in range(3) for last in range(first + 1, 4)
] + [Interval(stack=SINGLE.path, first=0, last=1), Interval(stack=SINGLE.path, first=1, last=2)]
TEXTS = [TextRun(stack=DUAL.path, reference=0, last=2), TextRun(stack=DUAL.path, reference=1, last=3)]
SWAPS = [FfnSwap(stack=DUAL.path, block=block, streams=("image",)) for block in (0, 2)]
OPERATIONS = [*INTERVALS, *TEXTS, *SWAPS]


@pytest.fixture(scope="module")
def teacher():
    return runner()


@pytest.fixture(scope="module")
def costs(teacher):
    return Costs(teacher.transformer, teacher.adapter, batches()[0], torch.bfloat16)


def measured(teacher, costs, seed, operations=OPERATIONS):
    """Every operation, with an error of its own."""
    drawn, whole = random.Random(seed), costs(plan_of(teacher))
    return [
        Measured(operation=o, error=drawn.uniform(0.01, 1), saves=whole - costs(plan_of(teacher, o)))
        for o in operations
    ]


def recipe(*targets, limits=(10, 10), **select):
    return Recipe.model_validate(
        {
            "teacher": {"path": "x"},
            "targets": [{"name": f"t{number}", **target} for number, target in enumerate(targets)],
            "select": {"batches": 2, "order": "program", **select},
            "width": {"text_blocks": limits[0], "ffn_blocks": limits[1]},
            "modulation": {"rank": 2} if any("modulation" in target for target in targets) else None,
        }
    )


def apart(found, operations):
    """Errors that add up in squares, as operations that know nothing of each other would have them."""
    error = {m.operation: m.error for m in found}
    squares = [error[operation] ** 2 for operation in operations]
    return sum(squares) ** 0.5, [(sum(squares) - square) ** 0.5 for square in squares]


def programmed(teacher, found, given, costs, together, low=()):
    return choose_by_program(
        plan_of(teacher), found, given.targets, costs, given.width, together=together, modulation=low
    )


def least(base, found, costs, goal, fits=bool):
    """The least sum of squares of all subsets that make a plan and meet a goal; None where there is none."""
    best = None
    for size in range(len(found) + 1):
        for subset in itertools.combinations(found, size):
            error = sum(m.error**2 for m in subset)
            if best is not None and error >= best:
                continue
            try:
                plan = base.with_operations([*base.operations, *(m.operation for m in subset)])
            except ValueError:
                continue
            if fits(plan) and not goal.missing(costs(plan)):
                best = error
    return best


def spent(found, plan):
    return sum(m.error**2 for m in found if m.operation in plan.operations)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("asked", [{"params": "70%"}, {"flops": "60%"}, {"params": "75%", "flops": "70%"}])
def test_nothing_that_is_valid_and_small_enough_has_a_smaller_sum(teacher, costs, seed, asked):
    found = measured(teacher, costs, seed)
    given = recipe(asked)
    choice = programmed(teacher, found, given, costs, partial(apart, found))
    goal = Goal(given.targets[0], costs(plan_of(teacher)))
    assert not goal.missing(costs(choice.plans["t0"]))
    assert spent(found, choice.plans["t0"]) == pytest.approx(least(plan_of(teacher), found, costs, goal))


@pytest.mark.parametrize("seed", range(3))
def test_limits_of_the_recipe_and_of_a_target_hold(teacher, costs, seed):
    found, whole = measured(teacher, costs, seed), costs(plan_of(teacher))
    given = recipe({"params": "72%", "depth": "80%"}, limits=(2, 1))
    goal = Goal(given.targets[0], whole)
    block = max(m.saves.params / m.operation.removed for m in found if isinstance(m.operation, Interval))

    def fits(plan):
        runs = sum(run.last - run.reference for run in plan.text_runs)
        deep = whole.params - costs(plan_of(teacher, *plan.intervals)).params
        return runs <= 2 and len(plan.ffn_swaps) <= 1 and deep <= whole.params - goal.depth + block

    plan = programmed(teacher, found, given, costs, partial(apart, found)).plans["t0"]
    assert fits(plan)
    assert spent(found, plan) == pytest.approx(least(plan_of(teacher), found, costs, goal, fits))


@pytest.mark.parametrize("seed", range(4))
def test_targets_nest_and_a_smaller_one_is_the_best_beside_what_the_larger_loses(teacher, costs, seed):
    found = measured(teacher, costs, seed)
    given = recipe({"params": "65%"}, {"params": "85%", "width": False})
    choice = programmed(teacher, found, given, costs, partial(apart, found))
    small, large = choice.plans["t0"], choice.plans["t1"]
    assert set(large.operations) <= set(small.operations) and large.is_depth_only
    assert set(choice.order) == set(small.operations)
    # From the bank, sizes between the targets are made of the first operations of the order.
    assert set(choice.order[: len(large.operations)]) == set(large.operations)
    goal, base = Goal(given.targets[0], costs(plan_of(teacher))), large
    rest = [m for m in found if m.operation not in large.operations]
    expected = least(base, rest, costs, goal) + spent(found, large)
    assert spent(found, small) == pytest.approx(expected)


def test_modulation_goes_first_and_saves_what_it_saves(teacher, costs):
    found = measured(teacher, costs, 3, INTERVALS)
    low = [ModulationSwap(stack=stack.path, rank=2) for stack in (DUAL, SINGLE)]
    given = recipe({"params": "60%", "modulation": True, "width": False}, {"modulation": True})
    choice = programmed(teacher, found, given, costs, partial(apart, found), low)
    base, goal = plan_of(teacher, *low), Goal(given.targets[0], costs(plan_of(teacher)))
    assert choice.plans["t1"].operations == base.operations
    assert set(low) <= set(choice.plans["t0"].operations)
    assert spent(found, choice.plans["t0"]) == pytest.approx(least(base, found, costs, goal))


def test_what_costs_more_together_is_left_for_another_choice(teacher, costs):
    """Alone the first two are cheapest; together they are ruinous, and only measuring tells."""
    blocks = [Interval(stack=DUAL.path, first=0, last=1), Interval(stack=DUAL.path, first=2, last=3), INTERVALS[-1]]
    whole = costs(plan_of(teacher))
    found = [
        Measured(operation=o, error=error, saves=whole - costs(plan_of(teacher, o)))
        for o, error in zip([*blocks, INTERVALS[-2]], (0.1, 0.1, 0.2, 0.25), strict=True)
    ]

    def together(operations):
        error, without = apart(found, operations)
        if set(blocks[:2]) <= set(operations):
            return error + 1, [w + (o not in blocks[:2]) for w, o in zip(without, operations, strict=True)]
        return error, without

    asked = {"params": f"{100 - 95 * (found[0].saves.params + found[2].saves.params) / whole.params:.2f}%"}
    alone = programmed(teacher, found, recipe(asked), costs, partial(apart, found)).plans["t0"]
    assert alone.operations == tuple(blocks[:2])
    plan = programmed(teacher, found, recipe(asked), costs, together).plans["t0"]
    assert set(plan.operations) in [{blocks[0], blocks[2]}, {blocks[1], blocks[2]}]


@pytest.mark.parametrize("unit", ["params", "flops"])
@pytest.mark.parametrize("operations", [INTERVALS, [*INTERVALS[:4], INTERVALS[-1], *TEXTS, SWAPS[1]]])
def test_what_is_out_of_reach_names_the_nearest_that_any_combination_comes_to(teacher, costs, operations, unit):
    """What is cheapest goes first in a greedy choice, and is in the way of what saves more."""
    found, plans = measured(teacher, costs, 0, operations), [plan_of(teacher)]
    for size in range(1, 5):
        for subset in itertools.combinations(operations, size):
            with contextlib.suppress(ValueError):
                plans.append(plan_of(teacher, *subset))
    nearest = min(costs(plan).of(unit) for plan in plans)
    with pytest.raises(PpclError, match=rf"target 't0': 5% is .*, the candidates reach {nearest:,} .* allow more"):
        programmed(teacher, found, recipe({unit: "5%"}), costs, partial(apart, found))
    # It can be asked for.
    programmed(teacher, found, recipe({unit: str(nearest)}), costs, partial(apart, found))


def test_savings_in_common_are_known(teacher, costs):
    """A text run saves less where an interval takes blocks out of it: the sum alone would fall short."""
    found = measured(teacher, costs, 0, [INTERVALS[1], TextRun(stack=DUAL.path, reference=0, last=3)])
    whole = costs(plan_of(teacher))
    summed = whole.params - sum(m.saves.params for m in found)
    both = costs(plan_of(teacher, *(m.operation for m in found))).params
    assert both > summed
    program = partial(Program, plan_of(teacher), [m.operation for m in found], costs)
    assert program(lambda cost: {"params": d} if (d := cost.params - both) > 0 else {}).solve([1, 1]) == [0, 1]
    assert program(lambda cost: {"params": d} if (d := cost.params - both + 1) > 0 else {}).solve([1, 1]) is None


def test_one_operation_together_is_what_it_is_alone(teacher):
    for operation in (INTERVALS[0], SWAPS[1]):
        ((_, error),) = measure(teacher, plan_of(teacher), [operation], batches(size=4), 2)
        assert measure_together(teacher, plan_of(teacher), [operation], batches(size=4), 2) == (error, [0.0])


def test_several_are_measured_in_place_together():
    """Identities cost nothing, together as alone, nor do FFNs of the block that stands for an interval."""
    teacher = runner()
    for index in (1, 2, 3):
        identity(teacher.transformer.transformer_blocks[index])
    free, dear = Interval(stack=DUAL.path, first=2, last=3), Interval(stack=SINGLE.path, first=0, last=1)
    swap = FfnSwap(stack=DUAL.path, block=2, streams=("image", "text"))
    run = TextRun(stack=DUAL.path, reference=0, last=1)
    error, without = measure_together(teacher, plan_of(teacher), [free, swap, run, dear], batches(size=4), 2)
    ((_, alone),) = measure(teacher, plan_of(teacher), [dear], batches(size=4), 2)
    assert error == pytest.approx(alone, rel=1e-3)
    assert without[:3] == pytest.approx([alone, alone, error], rel=1e-3) and without[3] < 1e-3


def test_the_stage_tries_all_intervals_and_goes_on_after_a_kill(teacher, tmp_path, monkeypatch):
    given = recipe({"params": "60%"}, {"params": "80%", "width": False}, longest=3)
    found = ([INTERVALS[2], TextRun(stack=DUAL.path, reference=0, last=3)], ())
    arguments = (teacher, plan_of(teacher), found, batches(size=4), given)
    select(*arguments, desk(tmp_path / "whole"))
    whole = Choice.load(tmp_path / "whole")
    rows = {
        label for label in (tmp_path / "whole" / "measured.json").read_text().split('"') if label.startswith(DUAL.path)
    }
    for first, last in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)):
        assert f"{DUAL.path}[{first},{last}]" in rows
    assert {f"{DUAL.path} text [{a},{b}]" for a, b in ((0, 1), (1, 3), (2, 3))} <= rows
    assert f"{DUAL.path}[1] ffn image" in rows
    assert whole.plans["t1"].is_depth_only and not list((tmp_path / "whole").glob("measured-*"))

    real, calls = stage.measure_together, []

    def killed(*asked):
        calls.append(asked)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*asked)

    monkeypatch.setattr(stage, "measure_together", killed)
    with pytest.raises(KeyboardInterrupt):
        select(*arguments, desk(tmp_path / "killed"))
    noted = len(calls) - 1
    monkeypatch.setattr(stage, "measure", lambda *_: pytest.fail("measured again") if _[2] else iter(()))
    select(*arguments, desk(tmp_path / "killed"))
    assert noted == 1 and Choice.load(tmp_path / "killed") == whole


def test_a_greedy_choice_is_no_better_by_what_both_go_by(teacher, costs):
    for seed in range(5):
        found = measured(teacher, costs, seed)
        given = recipe({"params": "68%"})
        program = programmed(teacher, found, given, costs, partial(apart, found)).plans["t0"]
        greedy = choose(plan_of(teacher), found, given.targets, costs, given.width).plans["t0"]
        assert spent(found, program) <= spent(found, greedy) + 1e-12


def test_a_plan_counts_the_candidates_and_the_runs_of_what_is_measured_together(teacher, tmp_path, monkeypatch):
    given = recipe({"params": "60%"}, limits=(0, 10), longest=3)
    select(teacher, plan_of(teacher), ([], ()), batches(size=4), given, desk(tmp_path / "select"))
    chosen = Choice.load(tmp_path / "select").plans
    blocks = SimpleNamespace(
        params={stack.path: [0] * len(teacher.blocks(stack.path)) for stack in (DUAL, SINGLE)},
        model=SimpleNamespace(runner=teacher),
    )
    memory = Memory(given, blocks, chosen)
    assert memory.candidates == len(json.loads((tmp_path / "select" / "measured.json").read_text()))
    runs, velocity, feed = [], Runner.velocity, Runner.feed
    monkeypatch.setattr(Runner, "velocity", lambda self, batch: (runs.append(batch), velocity(self, batch))[1])
    monkeypatch.setattr(Runner, "feed", lambda self, given, *rest: feed(self, _noted(given, runs), *rest))
    measure_together(teacher, plan_of(teacher), chosen["t0"].operations, batches(size=4), 2)
    assert len(chosen["t0"].operations) > 1
    assert memory.together == ROUNDS * len(runs) / 2


def _noted(given, runs):
    for batch in given:
        runs.append(batch)
        yield batch
