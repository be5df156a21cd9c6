"""Width distillation: every narrow form is in the bank, starts from least squares, and goes on where it was killed."""

import json

import pytest
import torch
from families import TRANSFORMERS
from runs import DUAL, batches, desk, equal, plan_of, runner

from ppcl_toolkit.artifacts.storage import Bank, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun, trained_forms
from ppcl_toolkit.recipe import Depth, Width
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages import width as stage
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.surgery.assemble import count_parameters, student_of

OPERATIONS = (
    Interval(stack=DUAL.path, first=1, last=2),
    TextRun(stack=DUAL.path, reference=1, last=5),
    FfnSwap(stack=DUAL.path, block=0, streams=("image", "text")),
    FfnSwap(stack=DUAL.path, block=4, streams=("image",)),
)
KEYS = [
    "transformer_blocks.0-0.ffn_image_text",
    "transformer_blocks.3-3.text_1-2_inside",
    "transformer_blocks.4-4.text_1-2_inside",
    "transformer_blocks.5-5.text_1-2_end",
    "transformer_blocks.4-4.text_1-2_inside.ffn_image",
]


def section(**changes):
    return Width(**{"steps": 3, "batch": 2, "learning_rate": 1e-3, "batches": 4, "checkpoint_every": 2, **changes})


@pytest.fixture(scope="module")
def teacher():
    return runner(6, 2)


@pytest.fixture(scope="module")
def depth(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    plan = plan_of(teacher, *OPERATIONS)
    distill_depth(teacher, [plan], batches(), Depth(steps=1, learning_rate=1e-3), desk(folder))
    return Bank(folder)


@pytest.fixture(scope="module")
def whole(teacher, depth, tmp_path_factory):
    """What an undisturbed stage makes."""
    return distilled(teacher, depth, tmp_path_factory.mktemp("whole"))


def distilled(teacher, depth, folder, operations=OPERATIONS, **changes):
    plans = [plan_of(teacher, *operations)]
    stopped = distill_width(teacher, plans, depth, batches(), section(**changes), desk(folder))
    bank = Bank(folder)
    return {key: bank[key] for key in bank}, json.loads((folder / "losses.json").read_text()), stopped


def test_a_block_that_came_apart_is_not_blamed_on_too_few_tokens(teacher, depth, tmp_path):
    """As a learning rate leaves it that is far too large."""
    (tmp_path / "bank").mkdir()
    for key in depth:
        save_tree(tmp_path / "bank" / f"{key}.safetensors", {n: torch.nan * v for n, v in depth[key].items()})
    operations = (OPERATIONS[0], FfnSwap(stack=DUAL.path, block=1, streams=("image", "text")))
    with pytest.raises(PpclError, match=r"^transformer_blocks.1-2.*linear_ffn_.*not finite: .* smaller learning_rate"):
        distilled(teacher, Bank(tmp_path / "bank"), tmp_path / "width", operations)


def test_every_bank_entry_loads_and_the_student_runs(teacher, depth, tmp_path):
    bank, losses, stopped = distilled(teacher, depth, tmp_path, steps=1)
    assert sorted(bank) == sorted(losses) == sorted(KEYS)
    assert not stopped
    plan = plan_of(teacher, *OPERATIONS)
    forms = {form.key for form in trained_forms([plan])}
    assert forms == {*bank, *depth}
    student = student_of(teacher.transformer, teacher.adapter, plan, Bank(*depth.folders, tmp_path), batches()[0])
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == count_parameters(teacher.transformer, teacher.adapter, plan, batches()[0])
    with torch.no_grad():
        assert torch.isfinite(student(**batches()[0])[0]).all()
    # Every plan that needs no other form is served, too.
    for operations in (OPERATIONS[:2], OPERATIONS[:3]):
        known = Bank(*depth.folders, tmp_path)
        student_of(teacher.transformer, teacher.adapter, plan_of(teacher, *operations), known, batches()[0])


@pytest.mark.parametrize(
    "operation",
    [
        TextRun(stack=DUAL.path, reference=1, last=3),
        FfnSwap(stack=DUAL.path, block=3, streams=("text",)),
        FfnSwap(stack=DUAL.path, block=3, streams=("image", "text")),
    ],
    ids=str,
)
def test_text_that_nobody_reads_may_become_linear_and_learns_nothing(operation, tmp_path):
    transformer, adapter, call = TRANSFORMERS["qwenimage"]()
    run = Runner(transformer.requires_grad_(False), adapter)
    plan = Plan(family="qwen_image", depths=adapter.depths(transformer)).with_operations([operation])
    latents = call["hidden_states"].shape[1:]
    arguments = {n: v[:1] for n, v in call.items() if n not in ("hidden_states", "timestep", "return_dict")}
    samples = [Sample(latents=torch.randn(1, *latents), arguments=arguments) for _ in range(4)]
    noised = Batches(samples=samples, adapter=adapter, size=2, seed=1)
    stopped = distill_width(run, [plan], Bank(), noised, section(), desk(tmp_path))
    assert not stopped
    bank = Bank(tmp_path)
    form = list(plan.forms())[-1]
    end = bank[form.key]
    dead = [end[name] for name in ("linear_text_h.weight", "linear_ffn_text.weight") if name in end]
    assert not any(weight.any() for weight in dead)
    assert len(dead) == 1
    assert all(value.isfinite().all() for value in end.values())
    # What is read learns.
    assert not torch.equal(end["attn.to_q.weight"], transformer.transformer_blocks[3].attn.to_q.weight)
    student = student_of(transformer, adapter, plan, bank, noised[0])
    assert torch.isfinite(student(**noised[0])[0]).all()


def test_maps_start_from_least_squares_and_the_rest_from_the_wider_block(teacher, depth, tmp_path):
    bank, losses, _ = distilled(teacher, depth, tmp_path, steps=0)
    assert all(curve == [] for curve in losses.values())
    block = teacher.transformer.transformer_blocks[0].state_dict()
    start = bank[KEYS[0]]
    assert start["linear_ffn_image.weight"].any()
    assert start["linear_ffn_text.bias"].any()
    assert all(torch.equal(value, block[name]) for name, value in start.items() if name.startswith("attn"))
    assert not any(name.startswith("ff") for name in start)
    # A block that loses its FFN after its text keeps the text's maps.
    text, both = bank[KEYS[2]], bank[KEYS[4]]
    assert torch.equal(text["linear_text_z.weight"], both["linear_text_z.weight"])


def test_the_loss_falls(teacher, depth, tmp_path):
    one = batches(count=1, size=1, sigma_std=1e-6)
    plans = [plan_of(teacher, *OPERATIONS[:3])]
    distill_width(teacher, plans, depth, one, section(steps=30, learning_rate=3e-3), desk(tmp_path))
    for key, curve in json.loads((tmp_path / "losses.json").read_text()).items():
        assert sum(loss for _, loss in curve[-6:]) < sum(loss for _, loss in curve[:6]), key


def test_streamed_equals_resident_bit_by_bit(depth, whole, tmp_path):
    resident, losses, _ = whole
    other = runner(6, 2, Placement(streamed=True, chunk=2))
    streamed, curves, _ = distilled(other, depth, tmp_path / "streamed")
    assert all(equal(resident[key], streamed[key]) for key in KEYS)
    assert losses == curves


def test_a_student_is_the_same_alone_or_among_others(teacher, depth, whole, tmp_path):
    together, _, _ = whole
    alone, _, _ = distilled(teacher, depth, tmp_path / "alone", OPERATIONS[2:3])
    assert list(alone) == KEYS[:1]
    assert equal(alone[KEYS[0]], together[KEYS[0]])


class Killed(Exception):
    pass


@pytest.mark.parametrize("kept", [0, 3, 4])
def test_a_stage_killed_while_banking_goes_on_bit_by_bit(teacher, depth, whole, tmp_path, monkeypatch, kept):
    bank, losses, _ = whole
    left = iter(range(kept))
    save = stage.train_segments.__globals__["save_tree"]

    def dying(path, tree):
        if next(left, None) is None:
            raise Killed
        save(path, tree)

    monkeypatch.setitem(stage.train_segments.__globals__, "save_tree", dying)
    with pytest.raises(Killed):
        distilled(teacher, depth, tmp_path / "killed")
    monkeypatch.undo()
    resumed, curves, _ = distilled(teacher, depth, tmp_path / "killed")
    assert all(equal(bank[key], resumed[key]) for key in KEYS)
    assert curves == losses
    assert not list((tmp_path / "killed").glob("state-*"))


def test_a_state_left_behind_by_a_finished_wave_is_in_nobodys_way(teacher, depth, whole, tmp_path):
    bank, losses, _ = whole

    # Killed between the last file of the first wave and the removal of its state.
    class Path(type(tmp_path)):
        def unlink(self, missing_ok=False):
            if self.name.startswith("state-"):
                raise Killed
            super().unlink(missing_ok)

    with pytest.raises(Killed):
        distilled(teacher, depth, Path(tmp_path / "killed"))
    assert list((tmp_path / "killed").glob("state-*"))
    resumed, curves, _ = distilled(teacher, depth, tmp_path / "killed")
    assert all(equal(bank[key], resumed[key]) for key in KEYS)
    assert curves == losses
    assert not list((tmp_path / "killed").glob("state-*"))


def test_without_narrow_forms_there_is_nothing_to_do(teacher, depth, tmp_path):
    bank, losses, stopped = distilled(teacher, depth, tmp_path, OPERATIONS[:1])
    assert (bank, losses, stopped) == ({}, {}, [])
