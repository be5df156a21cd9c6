"""Rules of methods against what a reader of their source would compute by hand, or by trying everything."""

import itertools
import math
import random

import pytest
import torch
from runs import DUAL, FLUX, SINGLE, batches, desk, identity, plan_of, runner

from ppcl_toolkit.comparison.spending import planned
from ppcl_toolkit.comparison.trials import best_factors, told
from ppcl_toolkit.comparison.verdict import holm, paired, two_sided
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.methods.block_scores import knapsack
from ppcl_toolkit.methods.oracle import best_set
from ppcl_toolkit.methods.tinyfusion import Gates, gated, groups_of, kept_counts
from ppcl_toolkit.methods.uniform import spread
from ppcl_toolkit.plan import Interval, ModulationSwap
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.rules.method import Ground, Method, Pick, Unreachable, Window, find_methods, known_methods
from ppcl_toolkit.rules.picking import chosen, first_that_fits, without
from ppcl_toolkit.rules.scores import Scores, score_blocks
from ppcl_toolkit.running.capture import run_block, stack_calls
from ppcl_toolkit.stages.depth import bank_starts, mean_of
from ppcl_toolkit.stages.intervals import Candidates, Curves
from ppcl_toolkit.surgery.assemble import student_of
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Measured

JOB = Recipe.model_validate(
    {
        "teacher": {"path": "x", "dtype": "float32"},
        "targets": [{"name": "a", "params": "60%", "width": False}],
        "depth": {"steps": 30, "batch": 2},
        "finetune": {"steps": 50, "batch": 2},
    }
)


@pytest.fixture(scope="module")
def teacher():
    return runner()


def scores_of(**given):
    flat = {name: [1.0] * 7 for name in ("influence", "change", "removal", "early", "sensitivity")}
    return Scores(samples=4, **{**flat, **given})


def ground(teacher, share=0.6, tolerance=0.06, *, unit="params", **given):
    costs = Costs(teacher.transformer, FLUX, batches()[0], torch.float32)
    plan = plan_of(teacher)
    return Ground(
        job=JOB,
        runner=teacher,
        costs=costs,
        plan=plan,
        window=Window(unit=unit, aim=int(share * costs(plan).of(unit)), tolerance=tolerance),
        seed=0,
        batches=lambda stage, size: batches(size),  # noqa: ARG005
        **{
            "lever": (),
            "scores": scores_of(),
            "found": Candidates({}, (), {}),
            "measured": (),
            "passes": 4000,
            **given,
        },
    )


def size(where, pick):
    return where.costs(pick.plan).of(where.window.unit)


def rule(name):
    (method,) = find_methods([name])
    return method.rule


@pytest.mark.parametrize("seed", range(30))
def test_the_first_set_that_fits_is_the_first_of_all_sets_in_their_order(seed):
    draw = random.Random(seed)
    saves = [draw.choice([5, 13]) for _ in range(9)]
    least = draw.randrange(5, 60)
    most = least + draw.randrange(0, 6)
    # Every set as which items it has: the earlier an item, the more it counts; none has more than it needs.
    fitting = []
    for has in itertools.product((True, False), repeat=9):
        sums = list(itertools.accumulate(s * h for s, h in zip(saves, has, strict=True)))
        if least <= sums[-1] <= most and not any(least <= s < sums[-1] for s in sums):
            fitting.append(has)
    found = first_that_fits(saves, least, most)
    if fitting:
        assert found == [number for number, h in enumerate(max(fitting)) if h]
    else:
        totals = {sum(c) for n in range(10) for c in itertools.combinations(saves, n)}
        miss = min(max(least - total, total - most) for total in totals)
        assert max(least - sum(saves[i] for i in found), sum(saves[i] for i in found) - most) == miss


@pytest.mark.parametrize("seed", range(20))
def test_the_oracles_set_is_the_best_of_all_sets(seed):
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    alone = torch.rand(7, generator=generator, dtype=torch.float64)
    both = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    both = (both + both.T).fill_diagonal_(0) + torch.diag(alone)
    saves = [draw.choice([5, 13]) for _ in range(7)]
    least = draw.randrange(10, 50)
    most = least + draw.randrange(4)
    stacks = [range(4), range(4, 7)]

    def error(gone):
        pairs = itertools.combinations(gone, 2)
        return sum(alone[i] for i in gone) + sum(both[i, j] - alone[i] - alone[j] for i, j in pairs)

    def missed(gone):
        return max(least - sum(saves[i] for i in gone), sum(saves[i] for i in gone) - most, 0)

    sets = [c for n in range(8) for c in itertools.combinations(range(7), n)]
    sets = [c for c in sets if not any(set(stack) <= set(c) for stack in stacks)]
    nearest = min(map(missed, sets))
    best = min((c for c in sets if missed(c) == nearest), key=error)
    assert best_set(alone, both, torch.tensor(saves).double(), least, most, stacks) == list(best)


def test_the_oracle_measures_blocks_and_pairs_as_they_are_without_them(teacher, tmp_path):
    """The best set of two blocks, by the transformer without each two of them."""
    where = ground(teacher, share=0.73, tolerance=0.05)
    pick = rule("oracle")(where, desk(tmp_path))
    assert where.window.off(size(where, pick)) == 0 and pick.passes == 0
    batch = batches(JOB.select.batch)[0]

    @torch.no_grad()
    def error(gone):
        by_hand = runner()
        for path, index in sorted(gone, key=lambda place: -place[1]):
            del by_hand.blocks(path)[index]
        return float((by_hand.transformer(**batch)[0] - teacher.transformer(**batch)[0]).square().mean())

    fitting = []
    for n in range(4):
        for gone in itertools.combinations(where.places, n):
            here = {path: sum(place[0] == path for place in gone) for path in where.plan.depths}
            left = where.whole - sum(where.cost(place) for place in gone)
            if where.window.off(left) == 0 and all(here[path] < depth for path, depth in where.plan.depths.items()):
                alone = {place: error([place]) for place in gone}
                pairs = sum(error(pair) - alone[pair[0]] - alone[pair[1]] for pair in itertools.combinations(gone, 2))
                fitting.append((sum(alone.values()) + pairs, gone))
    kept = pick.plan.kept()
    by_plan = without(where, min(fitting)[1]).plan.kept()
    assert kept == by_plan


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_the_best_of_all_sets(seed):
    draw = random.Random(seed)
    saves = [draw.choice([5, 13]) for _ in range(8)]
    errors = [draw.random() for _ in saves]
    least = draw.randrange(10, 50)
    sets = [c for n in range(9) for c in itertools.combinations(range(8), n)]
    fitting = [c for c in sets if least <= sum(saves[i] for i in c) <= least + 6]
    found = knapsack(errors, saves, least, least + 6)
    if not fitting:
        assert found is None
    else:
        best = min(sum(errors[i] for i in c) for c in fitting)
        assert sum(errors[i] for i in found) == pytest.approx(best)


def test_dropped_blocks_become_intervals_of_the_kept_ones(teacher):
    where = ground(teacher)
    gone = [(DUAL.path, 0), (DUAL.path, 2), (SINGLE.path, 1), (SINGLE.path, 2)]
    pick = without(where, gone)
    assert pick.plan.intervals == (
        Interval(stack=DUAL.path, first=0, last=2),
        Interval(stack=SINGLE.path, first=0, last=2),
    ) or pick.plan.kept() == {DUAL.path: [0, 3], SINGLE.path: [0]}
    # Before the first kept block lies a dropped one: what stands there begins as the kept one.
    assert pick.sources == {f"{DUAL.path}.0-2": (1,), f"{SINGLE.path}.0-2": (0,)}
    mean = without(where, gone, average=True)
    assert mean.sources == {f"{DUAL.path}.0-2": (0, 1, 2), f"{SINGLE.path}.0-2": (0, 1, 2)}


@torch.no_grad()
def test_the_student_of_copies_is_the_teacher_without_those_blocks(teacher, tmp_path):
    from ppcl_toolkit.artifacts.storage import Bank

    where = ground(teacher)
    gone = [(DUAL.path, 0), (DUAL.path, 2), (SINGLE.path, 1)]
    pick = without(where, gone)
    bank_starts(teacher, [pick.plan], pick.sources, desk(tmp_path))
    batch = batches()[0]
    student = student_of(teacher.transformer, FLUX, pick.plan, Bank(tmp_path), batch)
    found = student(**batch)[0]
    by_hand = runner()
    for path, index in sorted(gone, key=lambda place: -place[1]):
        del by_hand.blocks(path)[index]
    assert torch.equal(found, by_hand.transformer(**batch)[0])


def test_a_mean_is_the_mean_of_the_weights(teacher):
    blocks = list(teacher.blocks(SINGLE.path))[:2]
    mean = dict(mean_of(blocks).named_parameters())
    for name, value in blocks[0].named_parameters():
        assert torch.allclose(mean[name], (value + blocks[1].get_parameter(name)) / 2)


def test_scores_are_those_of_removal_by_hand(tmp_path):
    run = runner()
    identity(run.blocks(DUAL.path)[2])
    noised = batches()
    found = list(noised(0, 2))
    score_blocks(run, noised, 2, desk(tmp_path))
    scores = Scores.load(tmp_path)
    assert scores.samples == 4 and len(scores.change) == 7
    assert scores.looked == 4 * 7 and scores.removed == 4 * (7 + 6 + 5 + 4 + 3 + 2 + 1)
    # A block that hands on what it is given changes nothing, and its removal neither.
    for values in (scores.influence, scores.change, scores.removal, scores.early, scores.sensitivity):
        assert values[2] == pytest.approx(0, abs=1e-6) and min(values[:2] + values[3:]) > 1e-5
    with torch.no_grad():
        errors, weighted, noise = 0.0, 0.0, 0.0
        cosines, changes = [], []
        for batch in found:
            wanted = run.transformer(**batch)[0]
            short = runner()
            identity(short.blocks(DUAL.path)[2])
            del short.blocks(DUAL.path)[1]
            each = (short.transformer(**batch)[0] - wanted).square().mean((1, 2))
            errors, weighted = errors + each.sum(), weighted + (each * batch["timestep"]).sum()
            noise += batch["timestep"].sum()
            calls = stack_calls(run.transformer, FLUX, DUAL.path, batch)
            out = run_block(run.blocks(DUAL.path)[0], DUAL, calls.arguments[0], calls.streams)
            x, y = (torch.cat([streams.image, streams.text], 1) for streams in (calls.streams, out))
            cosines.append((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1))
            pairs = [(calls.streams.image, out.image), (calls.streams.text, out.text)]
            changes += [((b - a).norm(dim=(1, 2)) / a.norm(dim=(1, 2))) ** 2 for a, b in pairs]
    assert scores.removal[1] == pytest.approx(float(errors) / 4, rel=1e-4)
    assert scores.early[1] == pytest.approx(float(weighted / noise), rel=1e-4)
    assert scores.influence[0] == pytest.approx(1 - float(torch.stack(cosines).mean()), rel=1e-4)
    assert scores.change[0] == pytest.approx(float(torch.cat(changes).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("velocity", "removal"),
        ("block_influence", "influence"),
        ("flux_lite", "change"),
        ("laptop_diff", "removal"),
        ("amber_image", "early"),
        ("table2_baseline", "sensitivity"),
    ],
)
def test_a_rule_drops_the_blocks_of_the_lowest_scores(teacher, tmp_path, name, field):
    values = [9.0, 0.1, 8.0, 7.0, 6.0, 0.2, 5.0]
    where = ground(teacher, share=0.73, tolerance=0.05, scores=scores_of(**{field: values}))
    pick = rule(name)(where, desk(tmp_path))
    assert pick.plan.intervals == (
        Interval(stack=DUAL.path, first=0, last=1),
        Interval(stack=SINGLE.path, first=0, last=1),
    )
    assert where.window.off(size(where, pick)) == 0
    looked = name in ("block_influence", "flux_lite")
    assert pick.passes == (where.scores.looked if looked else where.scores.removed)


def test_late_blocks_go_first_in_hierarchical_prune(teacher, tmp_path):
    where = ground(teacher, share=0.73, tolerance=0.05)
    text = rule("hierarchical_prune_text")(where, desk(tmp_path))
    # Removal errors are equal, so position decides; the last single block is kept, as of each stack the dearest.
    by_hand = sorted(range(7), key=lambda i: 1 / math.exp((i + 1 - 7) / 7))
    assert by_hand[0] == 6 and text.plan.kept()[SINGLE.path] != [0, 1, 2]
    forms = list(text.plan.forms())
    first = next(number for number, form in enumerate(forms) if form.last > form.first)
    assert text.frozen == first + 1
    code = rule("hierarchical_prune_code")(where, desk(tmp_path))
    assert code.plan.kept()[DUAL.path][:3] == [0, 1, 2]


@pytest.mark.parametrize("name", ["hierarchical_prune_text", "hierarchical_prune_code", "laptop_diff", "uniform"])
def test_rules_work_above_the_lever(teacher, tmp_path, name):
    low = tuple(ModulationSwap(stack=stack.path, rank=3) for stack in FLUX.stacks)
    where = ground(teacher, share=0.6, tolerance=0.05, lever=low)
    pick = rule(name)(where, desk(tmp_path))
    assert pick.plan.modulation_swaps == low and where.window.off(size(where, pick)) == 0
    # Nothing before the first block that went has changed, so as many are frozen; the others learn.
    kept = [(form.stack, form.first) for form in pick.plan.forms()]
    assert not pick.frozen or kept[: pick.frozen] == where.places[: pick.frozen]


def test_evenly_spread_blocks_halve_the_gaps():
    assert spread(1) == [0] and spread(3)[0] == 1 and spread(7)[:3] == [3, 1, 5]
    assert sorted(spread(16)) == list(range(16))


def test_draws_differ_and_stay_the_same_for_all_seeds(teacher, tmp_path):
    where = ground(teacher)
    picks = [method.rule(where, desk(tmp_path)).plan for method in find_methods(["random"])]
    assert len(picks) == 5 and len({str(plan.operations) for plan in picks}) > 1
    assert picks == [method.rule(where, desk(tmp_path)).plan for method in find_methods(["random"])]


def test_the_lever_leaves_fewer_blocks_to_go(teacher, tmp_path):
    low = tuple(ModulationSwap(stack=stack.path, rank=3) for stack in FLUX.stacks)
    plain, lifted = (rule("velocity")(ground(teacher, lever=each), desk(tmp_path)) for each in ((), low))
    assert lifted.plan.modulation_swaps == low and not plain.plan.modulation_swaps
    gone = [sum(interval.removed for interval in pick.plan.intervals) for pick in (plain, lifted)]
    assert gone[1] < gone[0]


def test_flops_are_matched_where_they_are_asked_for(teacher, tmp_path):
    where = ground(teacher, share=0.6, tolerance=0.1, unit="flops")
    pick = rule("velocity")(where, desk(tmp_path))
    assert where.window.off(where.costs(pick.plan).flops) == 0


def measured(teacher, *spans):
    where = ground(teacher)
    found = []
    for stack, first, last, error in spans:
        operation = Interval(stack=stack.path, first=first, last=last)
        saves = where.costs(where.plan) - where.costs(where.plan.with_operations([operation]))
        found.append(Measured(operation=operation, error=error, saves=saves))
    return found


def test_the_products_own_choice_lands_in_the_window_or_says_that_it_cannot(teacher):
    options = measured(teacher, (DUAL, 0, 1, 0.1), (DUAL, 2, 3, 0.2), (SINGLE, 0, 1, 0.3))
    where = ground(teacher, share=0.73, tolerance=0.08, measured=options)
    assert where.window.off(size(where, chosen(where, options))) == 0
    with pytest.raises(Unreachable, match="the candidates reach"):
        chosen(ground(teacher, share=0.3, measured=options), options)


def test_lp_b_moves_ends_where_the_next_interval_permits(teacher, tmp_path):
    options = measured(teacher, (DUAL, 0, 1, 0.1), (SINGLE, 0, 1, 0.2))
    where = ground(teacher, share=0.76, tolerance=0.2, measured=options)
    pick = rule("table2_lp_b")(where, desk(tmp_path))
    assert Interval(stack=DUAL.path, first=0, last=2) in pick.plan.intervals


def test_lp_a_takes_intervals_of_a_threshold(teacher, tmp_path):
    cka = {DUAL.path: torch.ones(4, 4).triu(), SINGLE.path: torch.ones(3, 3).triu()}
    cka[DUAL.path][0, 2:] = 0.5
    curves = {path: {"image": Curves(table, table, table)} for path, table in cka.items()}
    where = ground(teacher, share=0.55, tolerance=0.1)
    where = Ground(**{**vars(where), "found": Candidates({}, (), curves)})
    pick = rule("table2_lp_a")(where, desk(tmp_path))
    assert set(pick.plan.intervals) <= {
        Interval(stack=DUAL.path, first=0, last=1),
        Interval(stack=DUAL.path, first=2, last=3),
        Interval(stack=SINGLE.path, first=0, last=2),
    }
    assert where.window.off(size(where, pick)) == 0


def test_rows_without_narrow_blocks_say_why(teacher, tmp_path):
    options = measured(teacher, (DUAL, 0, 1, 0.1), (DUAL, 2, 3, 0.2), (SINGLE, 0, 2, 0.3))
    where = ground(teacher, share=0.7, tolerance=0.2, measured=options)
    with pytest.raises(Unreachable):
        rule("paper")(where, desk(tmp_path))
    with pytest.raises(Unreachable, match="mixture of experts"):
        rule("dense2moe")(where, desk(tmp_path))


def test_groups_keep_what_a_stack_keeps():
    for depth, kept in itertools.product(range(1, 20), range(1, 20)):
        if kept <= depth:
            groups = groups_of(depth, kept)
            assert [block for blocks, _ in groups for block in blocks] == list(range(depth))
            assert sum(own for _, own in groups) == kept
            assert all(0 <= own <= len(blocks) <= 4 for blocks, own in groups)


def test_gates_draw_masks_and_learn_which_blocks_help():
    generator = torch.Generator().manual_seed(0)
    gates = Gates(groups_of(4, 2), generator)
    optimizer = torch.optim.SGD(gates.parameters(), lr=0.01)
    for _ in range(200):
        mask = gates(1.0, generator)
        assert mask.detach().round().tolist() == pytest.approx(mask.tolist(), abs=1e-6) and mask.sum() == 2
        (-(mask[1] + mask[3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gates.dropped() == [0, 2]


@torch.no_grad()
def test_a_gate_is_between_a_block_and_none(teacher):
    batch = batches()[0]
    calls = stack_calls(teacher.transformer, FLUX, DUAL.path, batch)
    block = teacher.blocks(DUAL.path)[0]
    given = {DUAL.image: calls.streams.image, DUAL.text: calls.streams.text, **calls.arguments[0]}
    whole = run_block(block, DUAL, calls.arguments[0], calls.streams)
    for gate, share in ((1.0, 1.0), (0.0, 0.0), (0.25, 0.25)):
        text, image = gated(block, DUAL, torch.tensor(gate))(**given)
        for made, x, y in ((text, calls.streams.text, whole.text), (image, calls.streams.image, whole.image)):
            assert torch.allclose(made, x + share * (y - x), atol=1e-6)


def test_tinyfusion_searches_with_a_quarter_of_the_budget(teacher, tmp_path):
    where = ground(teacher, share=0.6, tolerance=0.1, passes=2000)
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}
    pick = rule("tinyfusion")(where, desk(tmp_path))
    assert 0 < pick.passes <= 500 and pick.passes % (2 * 4 * 7) == 0
    kept = {stack: len(blocks) for stack, blocks in pick.plan.kept().items()}
    assert kept == kept_counts(where) and where.window.off(size(where, pick)) == 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.transformer.state_dict().items())
    with pytest.raises(Unreachable, match="a step of tinyfusion's search"):
        rule("tinyfusion")(ground(teacher, passes=100), desk(tmp_path))


def test_what_is_left_of_a_budget_becomes_steps(teacher):
    where = ground(teacher, passes=4000)
    plan = where.plan.with_operations([Interval(stack=DUAL.path, first=1, last=2)])
    (method,) = find_methods(["default"])
    sections, taken = planned(where, method, Pick(plan=plan), before=1000)
    # Depth: 3 blocks of the teacher and a student forward and backward; fine-tuning: 7, and 6 forward and backward.
    costs = {"depth": 2 * (3 + 3), "finetune": 2 * (7 + 3 * 6)}
    assert {stage: cost for stage, (_, cost) in sections.items()} == costs
    whole = 30 * costs["depth"] + 50 * costs["finetune"]
    for stage, steps in (("depth", 30), ("finetune", 50)):
        assert sections[stage][0].steps == int(3000 * steps / whole)
        assert taken[stage] == sections[stage][0].steps * costs[stage]
    frozen, _ = planned(where, find_methods(["velocity"])[0], Pick(plan=plan, frozen=2), before=0)
    assert frozen["finetune"][1] == 2 * (7 + 2 + 3 * 4)
    sequential, _ = planned(where, find_methods(["table2_lp"])[0], Pick(plan=plan), before=0)
    # The student's own path: block 0, and the student once more.
    assert sequential["depth"][1] == 2 * (3 + 3 + 2)
    with pytest.raises(Unreachable, match="4,000 block passes are too few for velocity"):
        planned(where, find_methods(["velocity"])[0], Pick(plan=plan), before=3990)


def test_the_best_rate_is_that_of_the_least_error_that_did_not_fail():
    def trial(method, factor, error, **given):
        cell = {"budget": 10, "target": "a", "modulation": True, "method": method}
        return {**cell, "factor": factor, "velocity_error": error, **given}

    tried = [
        trial("one", 0.3, 0.5),
        trial("one", 1.0, 0.2),
        trial("one", 3.0, 0.1, failed="depth broke off"),
        trial("two", 0.3, 0.9),
        trial("two", 1.0, 0.9),
        trial("three", 0.3, 0.0, failed="too few passes"),
    ]
    assert best_factors(tried) == {(10, "a", True, "one"): 1.0, (10, "a", True, "two"): 0.3}
    assert [told(each) for each in tried[1:3]] == ["×1 0.2000", "×3 failed: depth broke off"]


def test_rates_of_recovery_are_the_jobs_times_a_factor(teacher):
    where = ground(teacher, factor=0.5)
    plan = where.plan.with_operations([Interval(stack=DUAL.path, first=1, last=2)])
    sections, _ = planned(where, find_methods(["default"])[0], Pick(plan=plan), before=0)
    assert sections["depth"][0].learning_rate == pytest.approx(JOB.depth.learning_rate / 2)
    assert sections["finetune"][0].learning_rate == pytest.approx(JOB.finetune.learning_rate / 2)


def test_every_method_names_its_source_and_its_reading():
    names = [method.name for methods in known_methods().values() for method in methods]
    assert len(names) == len(set(names)) >= 20
    assert all(
        isinstance(method, Method) and method.source for methods in known_methods().values() for method in methods
    )
    with pytest.raises(PpclError, match="did you mean 'tinyfusion'"):
        find_methods(["tinyfuson"])


# Tables of Student's distribution: two-sided 5 % and 1 % points.
POINTS = [(1, 12.706, 0.05), (2, 4.303, 0.05), (4, 2.776, 0.05), (5, 4.032, 0.01), (9, 2.262, 0.05), (30, 2.750, 0.01)]


@pytest.mark.parametrize(("freedom", "t", "p"), POINTS)
def test_the_t_test_has_the_points_of_the_tables(freedom, t, p):
    assert two_sided(t, freedom) == pytest.approx(p, rel=2e-3)
    assert two_sided(-t, freedom) == two_sided(t, freedom) and two_sided(0, freedom) == 1


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12])
def test_the_t_test_is_the_tail_of_the_density(freedom):
    x = torch.linspace(-1.7, 1.7, 200_001, dtype=torch.float64)
    norm = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    within = torch.trapezoid(norm * (1 + x.square() / freedom) ** (-(freedom + 1) / 2), x)
    assert two_sided(1.7, freedom) == pytest.approx(1 - float(within), abs=1e-8)


def test_a_paired_test_takes_the_seeds_that_both_have():
    found = paired({"0": 0.5, "1": 0.7, "2": 0.6, "9": 0.0}, {"0": 0.4, "1": 0.5, "2": 0.3, "8": 1.0})
    assert found.difference == pytest.approx(0.2) and found.error == pytest.approx(0.1 / math.sqrt(3))
    assert found.p == pytest.approx(two_sided(2 * math.sqrt(3), 2))
    assert paired({"0": 1.0}, {"1": 1.0}) is None and paired({"0": 1.0}, {"0": 0.0}).p is None


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
