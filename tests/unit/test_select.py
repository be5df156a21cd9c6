"""Selection: errors are measured in the whole teacher, sizes are exact, and targets are nested."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from runs import DUAL, SINGLE, batches, desk, equal, identity, plan_of, runner
from strangers import aura_flow_transformer

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Recipe, Target, Width
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.candidates import ffn_candidates
from ppcl_toolkit.selection.choice import Choice
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.stages import select as stage
from ppcl_toolkit.stages.select import measure, select
from ppcl_toolkit.surgery.assemble import count_parameters
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training import substitution
from ppcl_toolkit.training.substitution import Measured
from ppcl_toolkit.units import UNITS, Cost, check_size, parse_size

PAIR = Interval(stack=DUAL.path, first=0, last=1)
RUN = Interval(stack=DUAL.path, first=1, last=3)
TAIL = Interval(stack=SINGLE.path, first=0, last=2)
TEXT = TextRun(stack=DUAL.path, reference=0, last=3)
SWAP = FfnSwap(stack=DUAL.path, block=0, streams=("image", "text"))
WIDE = Width(text_blocks=10, ffn_blocks=10)


def recipe(*targets, **sections):
    named = [{"name": f"t{i}", **target} for i, target in enumerate(targets)]
    return Recipe.model_validate({"teacher": {"path": "x"}, "targets": named, "select": {"batches": 2}, **sections})


def targets(*sizes, width=True):
    return [Target(name=size.strip("%"), params=size, width=width) for size in sizes]


@pytest.fixture(scope="module")
def teacher():
    return runner()


def costs_of(teacher):
    return Costs(teacher.transformer, teacher.adapter, batches()[0], torch.bfloat16)


@pytest.fixture(scope="module")
def costs(teacher):
    return costs_of(teacher)


@pytest.fixture(scope="module")
def sizes(costs):
    return lambda plan: costs(plan).params


@pytest.fixture(scope="module")
def measured(teacher, costs):
    found = [PAIR, RUN, TAIL, TEXT, SWAP]
    whole = costs(plan_of(teacher))
    return [
        Measured(operation=operation, error=error, saves=whole - costs(plan_of(teacher, operation)))
        for operation, error in measure(teacher, plan_of(teacher), found, batches(size=4), 3)
    ]


def test_parameters_are_counted_exactly(teacher, sizes):
    for operations in [
        (),
        (RUN, TAIL),
        (TEXT, FfnSwap(stack=DUAL.path, block=2, streams=("image",))),
        (PAIR, TEXT, SWAP),
        (Interval(stack=DUAL.path, first=1, last=2), TEXT, FfnSwap(stack=DUAL.path, block=3, streams=("image",))),
    ]:
        plan = plan_of(teacher, *operations)
        assert sizes(plan) == count_parameters(teacher.transformer, teacher.adapter, plan, batches()[0]), operations


def test_measuring_leaves_the_teacher_as_it_was():
    teacher = runner()
    before, expected = (
        {n: v.clone() for n, v in teacher.transformer.state_dict().items()},
        teacher.velocity(batches()[0]),
    )
    list(measure(teacher, plan_of(teacher), [PAIR, TEXT, SWAP], batches(), 1))
    assert equal(before, teacher.transformer.state_dict())
    assert torch.equal(teacher.velocity(batches()[0]), expected)
    assert not any("forward" in vars(module) for module in teacher.transformer.modules())


def test_a_streamed_teacher_measures_the_same(measured):
    teacher = runner(placement=Placement(streamed=True, chunk=2))
    found = [each.operation for each in measured]
    again = list(measure(teacher, plan_of(teacher), found, batches(size=4), 3))
    assert again == [(each.operation, each.error) for each in measured]


def test_an_interval_of_identities_costs_nothing():
    teacher = runner()
    for index in (2, 3):
        identity(teacher.transformer.transformer_blocks[index])
    (_, run), (_, other) = measure(teacher, plan_of(teacher), [RUN, PAIR], batches(size=4), 2)
    assert run < 1e-4
    assert other > 100 * run


def test_every_block_with_an_ffn_is_a_candidate(teacher):
    found = ffn_candidates(teacher, WIDE)
    assert [(swap.stack, swap.block, swap.streams) for swap in found] == [
        (DUAL.path, i, ("image", "text")) for i in range(4)
    ]
    assert ffn_candidates(teacher, Width(ffn_blocks=0)) == []


def test_sizes_are_shares_or_numbers():
    assert parse_size("70%", 1000) == 700
    assert parse_size(" 12.5 % ", 1000) == 125
    assert parse_size("8B", 12 * 10**9) == 8 * 10**9
    assert parse_size("650m", 12 * 10**9) == 650_000_000
    assert parse_size("1.5K", 2000) == 1500
    assert parse_size("12000", 12001) == 12000
    for wrong in ("", "70 percent", "-5%", "0%", "8T", "%", "nan"):
        with pytest.raises(PpclError, match="expected a share such as 70%, or a number such as 8B, 650M or 12000"):
            parse_size(wrong, 1000)
    for large in ("100%", "2B", "1000"):
        with pytest.raises(PpclError, match="is not smaller than the teacher's 1,000 parameters"):
            parse_size(large, 1000)


def in_params(size):
    return Cost(params=size, bytes=1, flops=1)


@pytest.mark.parametrize(
    ("unit", "text", "size"),
    [("bytes", "12GB", 12e9), ("bytes", "0.8 gb", 8e8), ("flops", "40T", 4e13), ("flops", "25%", 1e15)],
)
def test_sizes_in_other_units(unit, text, size):
    assert parse_size(text, 4 * 10**15, unit) == size
    with pytest.raises(PpclError, match=f"is not smaller than the teacher's 1,000 {UNITS[unit]}"):
        parse_size(text.replace("25%", "100%"), 1000, unit)


@pytest.mark.parametrize(("unit", "wrong"), [("params", "12GB"), ("bytes", "8B"), ("bytes", "12T"), ("flops", "4GB")])
def test_a_size_of_another_unit_is_refused(unit, wrong):
    with pytest.raises(PpclError, match=f"'{wrong}': expected a share such as 70%, or a number such as"):
        check_size(wrong, unit)


@pytest.mark.parametrize("unit", ["params", "bytes", "flops", "depth"])
@pytest.mark.parametrize("size", ["0%", "100%", "120%", "0", "-1", "much"])
def test_a_size_that_makes_no_sense_is_no_target(unit, size):
    with pytest.raises(ValidationError, match=rf"(?s){unit}.*target size '{size}'"):
        Target.model_validate({"name": "it", "params": "1%", unit: size})


def cheap(operation, error, saves=1):
    return Measured(operation=operation, error=error, saves=in_params(saves))


def test_candidates_are_taken_by_error_per_parameter(teacher, sizes, costs):
    plan, total = plan_of(teacher), sizes(plan_of(teacher))
    saved = {operation: total - sizes(plan_of(teacher, operation)) for operation in (PAIR, RUN, TAIL)}
    known = [cheap(PAIR, 0.1, saved[PAIR]), cheap(RUN, 0.3, saved[RUN]), cheap(TAIL, 0.05, saved[TAIL])]
    order = sorted(known, key=lambda m: m.error / m.saves.params)
    choice = choose(plan, known, targets("95%"), costs, Width())
    assert choice.order == (order[0].operation,)
    # PAIR and RUN overlap: the cheaper one keeps the other out.
    assert not {PAIR, RUN} <= set(choose(plan, known, targets("75%"), costs, Width()).order)


def test_smaller_targets_go_on_from_larger_ones(teacher, sizes, costs, measured):
    plan = plan_of(teacher)
    asked = [Target(name="small", params="50%"), Target(name="large", params="80%", width=False)]
    choice = choose(plan, measured, asked, costs, WIDE)
    assert list(choice.plans) == ["large", "small"]
    assert set(choice.plans["large"].operations) < set(choice.plans["small"].operations)
    assert choice.plans["large"].is_depth_only
    assert not choice.plans["small"].is_depth_only
    total = sizes(plan)
    for target in asked:
        count = count_parameters(teacher.transformer, teacher.adapter, choice.plans[target.name], batches()[0])
        assert count <= parse_size(target.params, total)
    # Any beginning of the order is a plan: other sizes are exported from it.
    for count in range(len(choice.order) + 1):
        plan.with_operations(choice.order[:count])


def test_what_a_later_candidate_makes_needless_is_given_back(teacher):
    saves = {PAIR: 100, TAIL: 500, SWAP: 150}
    known = [cheap(PAIR, 0.01, 100), cheap(SWAP, 0.03, 150), cheap(TAIL, 0.9, 500)]

    def size(plan):
        return in_params(1000 - sum(saves[operation] for operation in plan.operations))

    assert choose(plan_of(teacher), known, targets("45%"), size, WIDE).order == (PAIR, TAIL)
    assert choose(plan_of(teacher), known, targets("50%"), size, WIDE).order == (TAIL,)
    # What a larger target has stays.
    both = [Target(name="large", params="90%", width=False), Target(name="small", params="50%")]
    assert choose(plan_of(teacher), known, both, size, WIDE).order == (PAIR, TAIL)


FIGURES = {  # params, flops, error
    PAIR: (100, 300, 0.2),
    TAIL: (200, 200, 0.3),
    TEXT: (300, 10, 0.1),
    SWAP: (0, 150, 0.01),
}
KNOWN = [
    Measured(operation=operation, error=error, saves=Cost(params=params, bytes=2 * params, flops=flops))
    for operation, (params, flops, error) in FIGURES.items()
]


def summed(plan):
    """A teacher of 1000 in all units, two bytes a parameter."""
    left = [1000 - sum(FIGURES[o][i] for o in plan.operations if o in FIGURES) for i in (0, 1)]
    low = 300 * bool(plan.modulation_swaps)
    return Cost(params=left[0] - low, bytes=2 * (left[0] - low), flops=left[1])


def chosen(teacher, *asked, known=KNOWN, **options):
    named = [Target(**{"name": f"t{i}", **target}) for i, target in enumerate(asked)]
    return choose(plan_of(teacher), known, named, summed, WIDE, **options)


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        ({"params": "70%"}, (TEXT,)),  # 0.1 / 300 is the least
        ({"bytes": "1.4KB"}, (TEXT,)),  # the same in bytes
        ({"flops": "90%"}, (SWAP,)),  # 0.01 / 150
        ({"flops": "60%"}, (SWAP, PAIR)),  # then 0.2 / 300, before 0.3 / 200 and 0.1 / 10
        ({"flops": "54%"}, (PAIR, TAIL)),  # 460: SWAP and PAIR are 10 short, with TAIL the cheap one is needless
        # 0.01 / (150/400) first; of 400 and 250 short, 0.1 / (300/400 + 10/250) before 0.2 / (100/400 + 300/250);
        # of 100 and 240 short, 0.2 / (1 + 300/240) before 0.3 / (2 + 200/240): 600 and 540.
        ({"params": "60%", "flops": "60%"}, (SWAP, TEXT, PAIR)),
        # Once the parameters are there, FLOPs alone count.
        ({"params": "95%", "flops": "50%"}, (PAIR, TAIL)),
    ],
    ids=str,
)
def test_candidates_are_taken_by_error_per_share_of_what_is_missing(teacher, asked, order):
    choice = chosen(teacher, asked)
    assert choice.order == order
    cost = summed(choice.plans["t0"])
    assert all(
        cost.of(unit) <= parse_size(size, summed(plan_of(teacher)).of(unit), unit) for unit, size in asked.items()
    )


def test_what_saves_nothing_that_is_missing_stays(teacher):
    """SWAP costs nothing to speak of, and saves no parameters."""
    assert SWAP not in chosen(teacher, {"params": "41%"}).order
    # With the FLOPs met, too.
    assert SWAP not in chosen(teacher, {"params": "60%", "flops": "99%"}).order
    with pytest.raises(PpclError, match="39% is 390 parameters, the candidates reach 400"):
        chosen(teacher, {"params": "39%"})


def test_targets_of_several_units_nest(teacher):
    choice = chosen(teacher, {"flops": "50%"}, {"params": "70%"}, {"params": "60%", "flops": "60%"}, {"bytes": "90%"})
    assert list(choice.plans) == ["t3", "t1", "t2", "t0"]
    operations = [set(plan.operations) for plan in choice.plans.values()]
    assert all(one <= other for one, other in zip(operations, operations[1:], strict=False))
    assert summed(choice.plans["t0"]).flops <= 500


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"flops": "30%"}, r"'t0': 30% is 300 FLOPs, the candidates reach 340 \(34.0% of the teacher\); allow more"),
        (
            {"params": "90%", "flops": "30%"},
            r"'t0': 90% is 900 parameters, the candidates reach 400 \(40.0% of the teacher\); "
            r"30% is 300 FLOPs, the candidates reach 340 \(34.0% of the teacher\); allow more",
        ),
        ({"bytes": "700", "flops": "90%"}, "700 is 700 bytes, the candidates reach 800"),
    ],
)
def test_what_is_out_of_reach_in_one_unit_names_the_nearest_in_all(teacher, asked, message):
    with pytest.raises(PpclError, match=message):
        chosen(teacher, asked)


def test_modulation_saves_no_flops(teacher):
    low = (ModulationSwap(stack=DUAL.path, rank=1),)
    for asked, has in [({"flops": "60%"}, ()), ({"params": "70%"}, ()), ({"flops": "60%", "modulation": True}, low)]:
        choice = chosen(teacher, asked, modulation=low)
        assert choice.plans["t0"].modulation_swaps == has
        assert choice.order == ((TEXT,) if "params" in asked else (SWAP, PAIR))
    both = chosen(teacher, {"params": "70%", "flops": "60%", "modulation": True}, modulation=low)
    assert both.order == (SWAP, PAIR), "parameters are met by modulation alone"


def test_a_depth_of_its_own_holds_for_flops(teacher):
    assert chosen(teacher, {"flops": "54%", "depth": "85%"}).order == (PAIR, TAIL)
    with pytest.raises(PpclError, match="54% is 540 FLOPs, the candidates reach 550 .*, intervals stop at depth 90%"):
        chosen(teacher, {"flops": "54%", "depth": "90%"}, known=[m for m in KNOWN if m.operation != TEXT])


def test_intervals_stop_at_a_targets_depth(teacher, sizes, costs):
    """The paper's 10B: depth to a budget of its own, then text streams, then FFNs."""
    plan, total = plan_of(teacher), sizes(plan_of(teacher))
    by_depth, goal = sizes(plan_of(teacher, PAIR)), sizes(plan_of(teacher, PAIR, TEXT))
    known = [cheap(PAIR, 0.01, 3), cheap(TAIL, 0.5, 1), cheap(TEXT, 0.2, 1), cheap(SWAP, 0.3, 1)]

    def chosen(**changes):
        large = Target(name="large", params=str(by_depth), width=False)
        small = Target(name="small", params=str(goal), **changes)
        return choose(plan, known, [large, small], costs, WIDE, order="paper").plans

    # Without one, intervals do it all.
    assert chosen()["small"].operations == (PAIR, TAIL)
    assert chosen(depth=str(by_depth))["small"].operations == (PAIR, TEXT)
    assert chosen(depth=f"{100 * (by_depth + 1) / total:.6f}%")["small"].operations == (PAIR, TEXT)
    # One parameter less, and another interval goes.
    assert TAIL in chosen(depth=str(by_depth - 1))["small"].operations


def test_a_depth_that_is_reached_is_not_given_back(teacher):
    saves = {PAIR: 300, TEXT: 400}
    known = [cheap(PAIR, 0.9, 300), cheap(TEXT, 0.1, 400)]

    def size(plan):
        return in_params(1000 - sum(saves[operation] for operation in plan.operations))

    asked = Target(name="it", params="60%")
    assert choose(plan_of(teacher), known, [asked], size, WIDE, order="paper").order == (TEXT,)
    asked = asked.model_copy(update={"depth": "80%"})
    assert choose(plan_of(teacher), known, [asked], size, WIDE, order="paper").order == (PAIR, TEXT)


def test_a_depth_that_makes_no_sense_is_an_error(teacher, costs, measured):
    plan = plan_of(teacher)
    with pytest.raises(PpclError, match="target 'it': depth 40% is below params 50%"):
        choose(plan, measured, [Target(name="it", params="50%", depth="40%")], costs, WIDE)
    with pytest.raises(PpclError, match="intervals stop at depth 99%"):
        choose(plan, measured, [Target(name="it", params="50%", depth="99%")], costs, Width(text_blocks=1))
    with pytest.raises(ValidationError, match="a depth of its own and no width"):
        Target(name="it", params="50%", depth="60%", width=False)
    with pytest.raises(ValidationError, match="'x': expected a share"):
        Target(name="it", params="50%", depth="x")
    with pytest.raises(ValidationError, match="params, bytes, flops are missing"):
        Target(name="it", depth="60%", modulation=True)


@pytest.mark.parametrize("order", ["price", "paper"])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_text_run_longer_than_the_limit_is_shortened(teacher, sizes, costs, limit, order):
    best = TextRun(stack=DUAL.path, reference=3 - limit, last=3)
    goal = sizes(plan_of(teacher, best))
    asked = targets(str(goal))
    choice = choose(plan_of(teacher), [cheap(TEXT, 0.1)], asked, costs, Width(text_blocks=limit), order=order)
    assert choice.order == (best,)
    assert sizes(choice.plans[str(goal)]) == goal
    with pytest.raises(PpclError, match=f"the candidates reach {goal:,} "):
        choose(plan_of(teacher), [cheap(TEXT, 0.1)], targets(str(goal - 1)), costs, Width(text_blocks=limit))


@pytest.mark.parametrize(
    ("interval", "found", "left"),
    [
        ((2, 3), (0, 3), (0, 3)),  # ends where the interval ends
        ((2, 3), (0, 2), (0, 1)),
        ((1, 3), (0, 2), None),  # all but the reference is inside
    ],
)
def test_a_text_run_is_shortened_to_whole_blocks_of_the_student(teacher, sizes, costs, interval, found, left):
    deep = Interval(stack=DUAL.path, first=interval[0], last=interval[1])
    run = TextRun(stack=DUAL.path, reference=found[0], last=found[1])
    plan = plan_of(teacher)
    goal = sizes(plan_of(teacher, deep)) - bool(left)
    known = [cheap(deep, 0.01, 10**9), cheap(run, 0.5, 1)]
    choice = choose(plan, known, targets(str(goal)), costs, WIDE, order="paper")
    wanted = [TextRun(stack=DUAL.path, reference=left[0], last=left[1])] if left else []
    assert list(next(iter(choice.plans.values())).text_runs) == wanted


def test_of_a_run_that_begins_inside_an_interval_the_rest_is_taken():
    teacher = runner(6, 1)
    costs = costs_of(teacher)
    deep = [Interval(stack=DUAL.path, first=0, last=1), Interval(stack=DUAL.path, first=4, last=5)]
    run, left = (TextRun(stack=DUAL.path, reference=a, last=b) for a, b in ((1, 4), (2, 3)))
    known = [*(cheap(each, 0.01, 10**9) for each in deep), cheap(run, 0.5, 1)]
    goal = costs(plan_of(teacher, *deep, left)).params
    choice = choose(plan_of(teacher), known, targets(str(goal)), costs, WIDE, order="paper")
    assert choice.order == (*deep, left)


def test_of_an_ffn_swap_what_a_text_run_leaves_is_taken(teacher, sizes, costs):
    swap = FfnSwap(stack=DUAL.path, block=3, streams=("image", "text"))
    left = swap.model_copy(update={"streams": ("image",)})
    goal = sizes(plan_of(teacher, TEXT, left))
    known = [cheap(TEXT, 0.01, 10**9), cheap(swap, 0.5, 1)]
    choice = choose(plan_of(teacher), known, targets(str(goal)), costs, WIDE)
    assert choice.order == (TEXT, left)


def test_what_is_given_is_never_shortened(teacher, sizes, costs):
    with pytest.raises(PpclError, match="the candidates reach"):
        given = Width(text_blocks=1, given=(TextRun(stack=DUAL.path, reference=0, last=2),))
        deep = Interval(stack=DUAL.path, first=2, last=3)
        known = [cheap(deep, 0.01, 10**9), cheap(given.given[0], 0.5, 1)]
        choose(plan_of(teacher), known, targets(str(sizes(plan_of(teacher, deep)) - 1)), costs, given)


def test_what_is_left_of_a_candidate_is_shown_as_chosen(teacher, costs, tmp_path):
    known = [cheap(TEXT, 0.1), cheap(PAIR, 0.9)]
    choice = choose(plan_of(teacher), known, targets("98%"), costs, Width(text_blocks=1))
    choice.save(tmp_path, known)
    rows = json.loads((tmp_path / "measured.json").read_text())
    assert [row["chosen"] for row in rows] == [["98"], []]


def test_limits_of_the_recipe_are_kept(teacher, costs, measured):
    plan = plan_of(teacher)
    with pytest.raises(PpclError):
        choose(plan, [m for m in measured if m.operation in (TEXT, SWAP)], targets("90%"), costs, Width(ffn_blocks=0))
    choice = choose(plan, [m for m in measured if m.operation in (TEXT, SWAP)], targets("92%"), costs, WIDE)
    assert set(choice.order) <= {TEXT, SWAP}


@pytest.mark.parametrize("width", [True, False])
def test_a_target_out_of_reach_names_the_nearest(teacher, sizes, costs, measured, width):
    plan = plan_of(teacher)
    with pytest.raises(PpclError) as caught:
        choose(plan, measured, targets("90%", "3%", width=width), costs, WIDE)
    message = str(caught.value)
    assert message.startswith(f"target '3': 3% is {int(0.03 * sizes(plan)):,} parameters, the candidates reach ")
    nearest = int(message.split("reach ")[1].split(" (")[0].replace(",", ""))
    assert 0.03 * sizes(plan) < nearest < 0.9 * sizes(plan)
    assert choose(plan, measured, targets(str(nearest), width=width), costs, WIDE)
    assert "\n" not in message


def test_the_stage_writes_its_choice_and_every_figure(teacher, tmp_path):
    asked = recipe({"params": "80%", "width": False}, {"params": "60%"}, width={"text_blocks": 4, "ffn_blocks": 2})
    seen = []
    select(teacher, plan_of(teacher), ([PAIR, RUN, TAIL, TEXT], ()), batches(), asked, desk(tmp_path, seen))
    choice = Choice.load(tmp_path)
    assert list(choice.plans) == ["t0", "t1"]
    assert set(choice.plans["t1"].operations) == set(choice.order)
    assert len(seen) == 4 + 4  # and every FFN
    again = tmp_path / "again"
    again.mkdir()
    choice.save(again, [])
    assert Choice.load(again) == choice


def test_what_the_recipe_gives_replaces_the_search(teacher, tmp_path):
    given = [{"kind": "ffn_swap", "stack": DUAL.path, "block": 0, "streams": ["image"]}]
    asked = recipe({"params": "97%"}, width={"given": given, "ffn_blocks": 0})
    select(teacher, plan_of(teacher), ([TEXT], ()), batches(), asked, desk(tmp_path))
    assert [str(operation) for operation in Choice.load(tmp_path).order] == ["transformer_blocks[0] ffn image"]


def test_a_killed_measurement_goes_on_where_it_was(teacher, tmp_path, monkeypatch):
    asked = recipe({"params": "60%"}, width={"ffn_blocks": 10})
    select(teacher, plan_of(teacher), ([RUN, TAIL], ()), batches(size=4), asked, desk(tmp_path / "straight"))
    killed = desk(tmp_path / "killed")

    def dies(done, *_):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(teacher, plan_of(teacher), ([RUN, TAIL], ()), batches(size=4), asked, Desk(killed.folder, dies))
    asked_for = []
    whole = stage.measure
    monkeypatch.setattr(stage, "measure", lambda *args: asked_for.append(args[2]) or whole(*args))
    select(teacher, plan_of(teacher), ([RUN, TAIL], ()), batches(size=4), asked, killed)
    assert len(asked_for[0]) == len(json.loads((killed.folder / "measured.json").read_text())) - 2
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in tmp_path.iterdir()]
    assert files[0] == files[1]
    assert files[0].keys() == {"measured.json", "order.json", "targets.json"}


def test_what_a_candidate_saves_is_what_its_student_is_without(teacher, tmp_path):
    asked = recipe({"flops": "80%"}, width={"text_blocks": 4, "ffn_blocks": 1})
    select(teacher, plan_of(teacher), ([PAIR, TAIL, TEXT], ()), batches(), asked, desk(tmp_path))
    total = count_parameters(teacher.transformer, teacher.adapter, plan_of(teacher), batches()[0])
    for row in json.loads((tmp_path / "measured.json").read_text()):
        operation = TypeAdapter(substitution.Candidate).validate_python(row["operation"])
        plan = plan_of(teacher, operation)
        saved = total - count_parameters(teacher.transformer, teacher.adapter, plan, batches()[0])
        assert (row["saves"]["params"], row["saves"]["bytes"]) == (saved, 2 * saved)
        assert row["saves"]["flops"] > 0 and row["error"] > 0


def test_notes_of_an_earlier_version_are_gone_on_from(teacher, tmp_path):
    asked = recipe({"params": "80%"})
    table = desk(tmp_path)
    (tmp_path / "measured-0.json").write_text(json.dumps({str(PAIR): [0.125, 4711]}))
    select(teacher, plan_of(teacher), ([PAIR, TAIL], ()), batches(), asked, table)
    pair = next(row for row in json.loads((tmp_path / "measured.json").read_text()) if row["label"] == str(PAIR))
    assert pair["error"] == 0.125
    assert pair["saves"]["params"] != 4711


def test_candidates_of_several_groups_are_measured_as_those_of_one(teacher, measured, monkeypatch):
    monkeypatch.setattr(substitution, "_TOGETHER", 2)
    found = [each.operation for each in measured]
    again = list(measure(teacher, plan_of(teacher), found, batches(size=4), 3))
    assert again == [(each.operation, each.error) for each in measured]


SHIPPED = load_adapter("aura_flow")
JOINT = SHIPPED.stacks[0].path
WITH_FFN = replace(SHIPPED.stacks[0], ffn={"image": "ff", "text": "ff_context"})
AURA_FLOW = replace(SHIPPED, stacks=(WITH_FFN, SHIPPED.stacks[1]))


@pytest.fixture(scope="module")
def aura_flow():
    """AuraFlow adds its FFN to what enters the block: in place of the FFN, a linear map would delete the attention."""
    transformer = aura_flow_transformer().requires_grad_(False)
    noise = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            latents=torch.randn(1, 4, 8, 8, generator=noise),
            arguments={"encoder_hidden_states": torch.randn(1, 5, 32, generator=noise)},
        )
        for _ in range(4)
    ]
    return Runner(transformer, AURA_FLOW), Batches(samples=samples, adapter=AURA_FLOW, size=2, seed=0)


def test_what_an_architecture_refuses_is_left_out_and_said(aura_flow, tmp_path):
    run, noised = aura_flow
    plan = Plan(family="aura_flow", depths=AURA_FLOW.depths(run.transformer))
    pair, text = Interval(stack=JOINT, first=0, last=1), TextRun(stack=JOINT, reference=0, last=2)
    said = select(run, plan, ([pair, text], ()), noised, recipe({"params": "80%"}, width={}), desk(tmp_path))
    assert said == [
        "3 blocks' FFNs of joint_transformer_blocks cannot go and are left out: AuraFlowJointTransformerBlock cannot "
        "become joint_transformer_blocks.0-0.ffn_image_text: ff runs in parallel to the attention: a linear map would "
        "delete the attention"
    ]
    rows = json.loads((tmp_path / "measured.json").read_text())
    assert [row["label"] for row in rows] == [str(pair), str(text)]
    assert Choice.load(tmp_path).plans["t0"].operations


def test_what_is_given_and_refused_ends_the_run(aura_flow, tmp_path):
    run, noised = aura_flow
    plan = Plan(family="aura_flow", depths=AURA_FLOW.depths(run.transformer))
    swap = FfnSwap(stack=JOINT, block=0, streams=("image",))
    asked = recipe({"params": "50%"}, width={"given": [swap.model_dump()]})
    with pytest.raises(PpclError, match="AuraFlowJointTransformerBlock cannot become .*ff runs in parallel"):
        select(run, plan, ((), ()), noised, asked, desk(tmp_path))
