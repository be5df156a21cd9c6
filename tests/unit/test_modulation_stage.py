"""Stages `modulation` and `low_rank`: the rank, the curve and the bank, by hand and on every schedule."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from runs import DUAL, FLUX, SINGLE, batches, desk, plan_of, runner
from tiny import flux_pipeline
from torch import nn

from ppcl_toolkit.artifacts import passes
from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.artifacts.storage import Bank, Desk, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, TextRun, low_rank_forms, trained_forms
from ppcl_toolkit.recipe import Modulation, Recipe, Target, Width
from ppcl_toolkit.running.noise import Calibration
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.stages.modulation import LowRankChoice, bank_low_rank, check_modulation, find_modulation
from ppcl_toolkit.stages.samples import EMPTY, load_samples, record_samples
from ppcl_toolkit.surgery.assemble import reshape, student_blocks, student_of
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Measured
from ppcl_toolkit.units import Cost

SECTION = Modulation(rank=4, batches=16, velocity_batches=2)


SWAPS = tuple(ModulationSwap(stack=stack.path, rank=4) for stack in FLUX.stacks)


def spread_out(run):
    """A teacher whose conditioning varies as much as it is long."""
    with torch.no_grad():
        for parameter in run.transformer.time_text_embed.parameters():
            parameter.mul_(3)
    return run


def calibration(**options):
    made = batches(size=4, **{"uniform": True, "guidance": (1.0, 4.0), **options})
    return Calibration(batches=made, empty=None, facts={"negative_prompt": None})


def teacher(placement=None):
    return spread_out(runner(2, 2, placement))


def found_by(run, folder, section=SECTION, noised=None, progress=lambda *_: None):
    folder.mkdir(parents=True, exist_ok=True)
    find_modulation(run, noised or calibration(), section, Desk(folder, progress))
    return LowRankChoice.load(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, and its folder."""
    folder = tmp_path_factory.mktemp("modulation")
    return found_by(teacher(), folder), folder


@torch.no_grad()
def recorded(run, section=SECTION):
    """What a hook on the first layer sees in all calls of the calibration."""
    noised, seen = calibration(), []
    module = run.transformer.transformer_blocks[0].norm1.linear
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for number in range(section.batches):
        run.transformer(**noised[number])
    handle.remove()
    return torch.cat(seen).double().numpy()


def projected(layer, e, rank):
    """Weight and bias of the projection that numpy finds in the layer's outputs for vectors e."""
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    u, _, _ = np.linalg.svd(w @ (e - e.mean(0)).T, full_matrices=False)
    low = u[:, :rank] @ (u[:, :rank].T @ w)
    return torch.from_numpy(low).float(), torch.from_numpy(b + (w - low) @ e.mean(0)).float()


@torch.no_grad()
def by_hand(rank):
    """The teacher with its linears replaced by numpy's projections, and its velocity error."""
    run, noised = teacher(), calibration()
    e, made = recorded(run), copy.deepcopy(run.transformer)
    for stack in FLUX.stacks:
        for block in stack.blocks(made):
            for path in stack.modulation:
                layer = block.get_submodule(path)
                layer.weight, layer.bias = map(nn.Parameter, projected(layer, e, rank))
    wrong = energy = 0.0
    for number in range(SECTION.batches, SECTION.batches + SECTION.velocity_batches):
        expected, found = run.transformer(**noised[number])[0], made(**noised[number])[0]
        wrong += float((found - expected).double().square().sum())
        energy += float(expected.double().square().sum())
    return made, (wrong / energy) ** 0.5


def test_the_curve_is_measured_as_by_hand(whole):
    low, _ = whole
    assert low.rank == 4
    assert list(low.curve) == [1, 2, 4, 8, 16]  # 23 is the largest that saves anything
    for rank in (1, 4, 8):
        assert low.curve[rank] == pytest.approx(by_hand(rank)[1], rel=1e-3)
    assert list(low.curve.values()) == sorted(low.curve.values(), reverse=True)
    assert 0 < low.curve[16] < low.curve[1] / 4


def test_the_bank_has_the_teachers_layers(whole):
    low, folder = whole
    run = teacher()
    plan = plan_of(run, *low.swaps)
    bank = Bank(folder)
    assert {form.key for form in low_rank_forms([plan])} == set(bank)
    student = student_of(run.transformer, FLUX, plan, bank, batches()[0])
    batch = calibration()[50]
    made, _ = by_hand(4)
    with torch.no_grad():
        expected, found, original = (t(**batch)[0] for t in (made, student, run.transformer))
    assert (found - expected).abs().max() < 1e-2 * (original - expected).abs().max()


def test_every_schedule_gives_the_same_bits(whole, tmp_path):
    low, folder = whole
    other = found_by(teacher(Placement(streamed=True, chunk=2)), tmp_path)
    assert dataclasses.replace(other, sums=low.sums) == low
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == {
        path.name: path.read_bytes() for path in folder.rglob("*.safetensors")
    }
    assert not list(folder.glob("*.tmp"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [2, 5, 7, 9])
def test_a_killed_run_goes_on(whole, tmp_path, monkeypatch, at):
    low, folder = whole
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    calls = []

    def die(*_):
        calls.append(1)
        if len(calls) == at:
            raise Killed

    with pytest.raises(Killed):
        found_by(teacher(), tmp_path, progress=die)
    asked = []
    noised = calibration()
    original = type(noised.batches).__getitem__
    monkeypatch.setattr(type(noised.batches), "__getitem__", lambda own, n: asked.append(n) or original(own, n))
    other = found_by(teacher(), tmp_path, noised=noised)
    assert dataclasses.replace(other, sums=low.sums) == low
    # The first batch proves the layers; of the others none is recorded twice.
    assert len(asked) == 1 + max(0, SECTION.batches - at) + SECTION.velocity_batches
    for path in folder.rglob("*.safetensors"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_the_smallest_rank_within_an_error(tmp_path):
    errors = {rank: by_hand(rank)[1] for rank in range(1, 13)}
    bound = (errors[6] * errors[7]) ** 0.5
    found = found_by(teacher(), tmp_path, Modulation(error=bound, batches=16, velocity_batches=2))
    assert found.rank == min(rank for rank, error in errors.items() if error <= bound)
    assert set(found.curve) == {1, 2, 4, 8, 6, 7}  # powers of two, and halves between the last two
    assert found.curve[found.rank] <= bound < found.curve[found.rank - 1]


def test_an_error_out_of_reach(tmp_path):
    with pytest.raises(PpclError, match=r"modulation.error: 1e-09 is out of reach: rank 23, the largest"):
        found_by(teacher(), tmp_path, Modulation(error=1e-9, batches=2, velocity_batches=1))


@pytest.mark.parametrize("rank", [24, 32, 500])
def test_a_rank_beyond_the_width(rank):
    """32 features: a single block has 96 rows, and from 24 on two maps are larger than the one."""
    with pytest.raises(PpclError, match=f"modulation.rank: {rank} saves nothing, layers are 32 wide; from 1 to 23"):
        check_modulation(runner(), Modulation(rank=rank))


def named(*paths):
    stacks = tuple(dataclasses.replace(stack, modulation=paths) for stack in FLUX.stacks)
    return dataclasses.replace(FLUX, stacks=stacks)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (named(), "the blocks of flux have none of their own"),
        (named("norm1.linear", "norm.linear", "nowhere"), "no block of transformer_blocks has norm.linear, nowhere"),
        (named("attn"), "transformer_blocks: attn is a FluxAttention, modulation is a Linear"),
    ],
)
def test_adapters_that_do_not_fit(adapter, said):
    with pytest.raises(PpclError, match=said):
        check_modulation(Runner(runner().transformer, adapter), Modulation(rank=2))


def test_low_rank_already():
    run = teacher()
    plan = plan_of(run, *SWAPS)
    student = student_of(run.transformer, FLUX, plan, {f.key: zeros(run, f) for f in plan.forms()}, batches()[0])
    with pytest.raises(PpclError, match="or of low rank already"):
        check_modulation(Runner(student, FLUX), Modulation(rank=2))


def zeros(run, form):
    stack = FLUX.stack(form.stack)
    found = {}
    for path in stack.modulation:
        layer = run.blocks(form.stack)[form.first].get_submodule(path)
        found[f"{path}.0.weight"] = torch.zeros(form.modulation, 32)
        found[f"{path}.1.weight"] = torch.zeros(len(layer.weight), form.modulation)
        found[f"{path}.1.bias"] = torch.zeros(len(layer.weight))
    return found


@pytest.mark.parametrize(
    ("guidance", "embeds", "message"),
    [
        ((1.0, 3.0), True, r"modulation.guidance: 1 to 3 does not cover teacher.call.guidance_scale 3.5, at which"),
        ((4.0, 7.0), True, r"4 to 7 does not cover teacher.call.guidance_scale 3.5"),
        ((1.0, 7.0), False, "modulation.guidance: a teacher of this config is not told its guidance by 'guidance'"),
        ((1.0, 7.0), True, None),
        ((), False, None),
    ],
)
def test_guidance_that_does_not_cover_the_calls_is_known_before_anything_is_recorded(guidance, embeds, message):
    transformer = runner().transformer
    transformer.register_to_config(guidance_embeds=embeds)
    asked = Modulation(rank=2, guidance=guidance)
    expected = pytest.raises(PpclError, match=message) if message else contextlib.nullcontext()
    with expected:
        check_modulation(Runner(transformer, FLUX), asked, call={"guidance_scale": 3.5})


def test_guidance_that_the_teacher_is_not_told():
    made = batches()
    samples = [dataclasses.replace(s, arguments={**s.arguments, "guidance": None}) for s in made.samples]
    with pytest.raises(PpclError, match="modulation.guidance: the recorded calls have no 'guidance'"):
        dataclasses.replace(made, samples=samples, guidance=(1.0,))[0]


def test_the_calibration_covers_what_it_says():
    empty = batches(size=4, uniform=True, guidance=(1.0, 4.0), count=1)
    noised = dataclasses.replace(calibration(), empty=empty)
    drawn = [noised[number] for number in range(64)]
    levels = torch.cat([batch["timestep"] for batch in drawn])
    assert levels.min() < 0.02 < 0.98 < levels.max()
    quarters = levels.mul(4).long().clamp(max=3).bincount()
    assert quarters.min() > 0.15 * len(levels)
    assert torch.cat([batch["guidance"] for batch in drawn]).unique().tolist() == [1.0, 4.0]
    only = [number for number, batch in enumerate(drawn) if torch.equal(batch["pooled_projections"], pooled(empty))]
    assert only == list(range(0, 64, 8))
    said = noised.covered()
    assert said["guidance"] == [1.0, 4.0] and said["empty_prompt"] and said["samples"] == 6
    assert calibration(guidance=()).covered()["guidance"] == [3.5]


def pooled(made):
    return made.samples[0].arguments["pooled_projections"].expand(4, -1)


PLAN = (
    Interval(stack=DUAL.path, first=0, last=1),
    Interval(stack=SINGLE.path, first=0, last=1),
    TextRun(stack=DUAL.path, reference=2, last=3),
    FfnSwap(stack=DUAL.path, block=2, streams=("image", "text")),
)


def trained(run, plan, folder, seed=3):
    """A bank of blocks that learned something: their forms of the teacher, with noise on every weight."""
    folder.mkdir()
    student = copy.deepcopy(run.transformer)
    reshape(student, FLUX, plan, batches()[0])
    g = torch.Generator().manual_seed(seed)
    for block, form in student_blocks(student, FLUX, plan):
        if not form.is_teacher:
            state = {name: v + 0.1 * torch.randn(v.shape, generator=g) for name, v in block.state_dict().items()}
            save_tree(folder / f"{form.key}.safetensors", state)
    return Bank(folder)


@torch.no_grad()
def test_trained_blocks_are_factored_where_they_end(tmp_path):
    """Against numpy: the student of full rank with its layers replaced by projections of what the teacher recorded."""
    run = spread_out(runner(5, 3))
    low = found_by(run, tmp_path / "modulation")
    narrow = plan_of(run, *PLAN)
    plan = narrow.with_operations([*PLAN, *low.swaps])
    bank = trained(run, narrow, tmp_path / "width")
    bank_low_rank(run, [plan], bank, low, desk(tmp_path / "low_rank"))
    made = Bank(tmp_path / "low_rank")
    learned = {form.key for form in trained_forms([plan]) if form.key in bank}
    assert {key.rpartition(".modulation_")[0] for key in made} == learned
    student = student_of(
        run.transformer, FLUX, plan, bank.joined(tmp_path / "modulation", tmp_path / "low_rank"), batches()[0]
    )
    expected = student_of(run.transformer, FLUX, narrow, bank, batches()[0])
    e = recorded(run)
    for block, form in student_blocks(expected, FLUX, narrow):
        for path in FLUX.stack(form.stack).modulation:
            layer = dict(block.named_modules()).get(path)
            if layer is not None:
                layer.weight, layer.bias = map(nn.Parameter, projected(layer, e, 4))
    batch = calibration()[50]
    whole = student_of(run.transformer, FLUX, narrow, bank, batches()[0])
    wanted, found, full = (t(**batch)[0] for t in (expected, student, whole))
    assert (found - wanted).abs().max() < 1e-2 * (full - wanted).abs().max()
    # What is there is kept.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "low_rank").iterdir()}
    bank_low_rank(run, [plan], bank, low, desk(tmp_path / "low_rank"))
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "low_rank").iterdir()}


def target(name, params=None, **options):
    return Target(name=name, params=params, width=False, **options)


def chosen(*targets):
    run = runner(6, 4)
    plan = plan_of(run)
    pairs = [Interval(stack=s.path, first=i, last=i + 1) for s in FLUX.stacks for i in range(0, 4, 2)]
    saves = Cost(params=1000, bytes=2000, flops=10)
    measured = [Measured(operation=pair, error=0.1 * n, saves=saves) for n, pair in enumerate(pairs, start=1)]
    costs = Costs(run.transformer, FLUX, batches()[0], torch.bfloat16)
    found = choose(plan, measured, targets, costs, Width(), modulation=SWAPS)
    size = {name: costs(p).params / costs(plan).params for name, p in found.plans.items()}
    return {name: (p.intervals, p.modulation_swaps, size[name]) for name, p in found.plans.items()}, found, pairs


def test_a_target_has_modulation_before_anything_goes():
    plans, found, pairs = chosen(target("light", modulation=True), target("half", "60%", modulation=True))
    assert plans["light"][:2] == ((), SWAPS)
    intervals, swaps, share = plans["half"]
    assert swaps == SWAPS and 0 < len(intervals) < len(pairs)
    assert share <= 0.6
    assert found.order == intervals


def test_targets_without_it_are_chosen_as_ever():
    alone, _, _ = chosen(target("large", "85%"), target("small", "70%"))
    both, _, _ = chosen(target("large", "85%"), target("small", "70%"), target("low", "65%", modulation=True))
    assert {name: both[name] for name in alone} == alone
    # Fewer blocks go where modulation goes, and none that others keep.
    assert set(both["low"][0]) < set(both["small"][0])
    assert both["low"][2] <= 0.65


def test_the_empty_prompt_is_recorded_beside_the_others(tmp_path):
    pipeline = flux_pipeline()
    pipeline.transformer.requires_grad_(False)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree")
    call = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 8}
    given = {
        "teacher": {"path": "x", "dtype": "float32", "call": call},
        "samples": {"prompts": str(tmp_path / "prompts.txt"), "batch": 2},
        "targets": [{"name": "light", "modulation": True}],
        "modulation": {"rank": 2},
    }
    own = Teacher(pipeline, FLUX, "flux", "tiny")
    record_samples(Runner(pipeline.transformer, FLUX), own, Recipe.model_validate(given), desk(tmp_path / "samples"))
    (empty,) = load_samples(tmp_path / "samples", EMPTY)
    assert len(load_samples(tmp_path / "samples")) == 4
    expected = pipeline.encode_prompt("", None, max_sequence_length=8)[1]
    assert torch.equal(empty.arguments["pooled_projections"], expected)
