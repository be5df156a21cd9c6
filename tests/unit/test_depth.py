"""Depth distillation: where students start, that they need nobody else, and that both schedules give the same bits."""

import copy
import json

import pytest
import torch
from runs import DUAL, SINGLE, batches, desk, equal, identity, plan_of, runner
from torch.nn import functional

from ppcl_toolkit.artifacts.storage import Bank
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, Interval
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.running.capture import run_block
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.stages.depth import distill_depth, initial_students
from ppcl_toolkit.training.distill import finish

FIRST, SECOND, THIRD = (
    Interval(stack=DUAL.path, first=0, last=1),
    Interval(stack=DUAL.path, first=2, last=3),
    Interval(stack=SINGLE.path, first=0, last=2),
)
KEYS = ["transformer_blocks.0-1", "transformer_blocks.2-3", "single_transformer_blocks.0-2"]


def section(**changes):
    return Depth(**{"steps": 4, "batch": 2, "learning_rate": 1e-3, "checkpoint_every": 2, **changes})


def distilled(folder, *intervals, run=None, wrap=None, **changes):
    """The bank that distillation leaves, with its loss curves."""
    run = run or runner()
    plan = plan_of(run, *(intervals or (FIRST, SECOND, THIRD)))
    noised = batches() if wrap is None else wrap(batches())
    stopped = distill_depth(run, [plan], noised, section(**changes), desk(folder))
    bank = Bank(folder)
    return {key: bank[key] for key in bank}, json.loads((folder / "losses.json").read_text()), stopped


class Killed(Exception):
    pass


class Dying:
    """Batches that end the process, so to speak, at one of their numbers."""

    def __init__(self, noised, at):
        self.noised, self.at = noised, at

    def __call__(self, start, stop):
        return self.noised(start, stop)

    def __getitem__(self, number):
        if number == self.at:
            raise Killed
        return self.noised[number]


def test_every_interval_is_banked_with_its_curve(tmp_path):
    run = runner()
    before = copy.deepcopy(run.transformer.state_dict())
    bank, losses, stopped = distilled(tmp_path, run=run)
    assert sorted(bank) == sorted(losses) == sorted(KEYS)
    assert not stopped
    for key in KEYS:
        assert [step for step, _ in losses[key]] == [1, 2, 3, 4]
        stack, first = key.rsplit(".", 1)[0], int(key.rsplit(".", 1)[1][0])
        teacher = run.blocks(stack)[first].state_dict()
        assert {n: (v.shape, v.dtype) for n, v in bank[key].items()} == {
            n: (v.shape, torch.float32) for n, v in teacher.items()
        }
        assert not equal(bank[key], teacher)
    assert equal(run.transformer.state_dict(), before)
    assert {path.name for path in tmp_path.iterdir()} == {
        "losses.json",
        *(f"{key}.safetensors" for key in KEYS),
    }


@torch.no_grad()
def test_the_text_behind_the_last_block_has_no_part_in_the_loss(tmp_path):
    run, seen = runner(), []
    _, losses, _ = distilled(tmp_path, THIRD, run=run, steps=1)
    blocks = run.blocks(SINGLE.path)
    for block in blocks:
        block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    run.transformer(**batches()[0])
    # The student starts as the first block.
    (_, student), *_, (_, teacher) = seen
    expected = (2 - 2 * functional.cosine_similarity(student, teacher, dim=-1)).mean()
    assert losses["single_transformer_blocks.0-2"][0][1] == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_falls(tmp_path):
    one_batch = batches(count=1, size=1, sigma_std=1e-6)
    _, losses, _ = distilled(tmp_path, wrap=lambda _: one_batch, steps=30, learning_rate=3e-3)
    for curve in losses.values():
        assert sum(loss for _, loss in curve[-5:]) < 0.8 * sum(loss for _, loss in curve[:5])


def test_students_start_from_the_first_block_or_from_the_mean():
    run = runner()
    forms = [Form(DUAL.path, 1, 3), Form(SINGLE.path, 0, 1)]
    for form, student in zip(forms, initial_students(run, forms, batches(), "first"), strict=True):
        assert equal(student.state_dict(), run.blocks(form.stack)[form.first].state_dict())
        assert student is not run.blocks(form.stack)[form.first]
    for form, student in zip(forms, initial_students(run, forms, batches(), "average"), strict=True):
        members = [run.blocks(form.stack)[i].state_dict() for i in range(form.first, form.last + 1)]
        for name, value in student.state_dict().items():
            assert torch.allclose(value, sum(m[name] for m in members) / len(members), atol=1e-6)


@pytest.mark.parametrize("worker", [1, 2, 3])
def test_students_start_from_the_best_block(worker):
    """Of a run in which one block alone does anything, that one is the best."""
    run = runner()
    for index in {1, 2, 3} - {worker}:
        identity(run.transformer.transformer_blocks[index])
    (student,) = initial_students(run, [Form(DUAL.path, 1, 3)], batches(), "best")
    assert equal(student.state_dict(), run.transformer.transformer_blocks[worker].state_dict())


def test_identity_blocks_hand_on_their_streams():
    """What the next tests rest on."""
    run = runner()
    for stack in (DUAL, SINGLE):
        block = run.blocks(stack.path)[1]
        identity(block)
        seen = []

        class Recorder:
            reference = None

            def __init__(self, stack):
                self.stack, self.first, self.last = stack, 1, 1

            def read(self, reading, seen=seen):
                seen.append(reading)

        list(run.feed(batches()(0, 1), [Recorder(stack)]))
        output = run_block(block, stack, seen[0].arguments, seen[0].inputs)
        for one, other in zip(output, seen[0].inputs, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_a_student_of_identities_is_right_from_the_start(tmp_path):
    run = runner()
    for stack, index in ((DUAL, 1), (DUAL, 3), (SINGLE, 1), (SINGLE, 2)):
        identity(run.blocks(stack.path)[index])
    for loss in ("direction", "relative_mse", "direction_magnitude"):
        _, losses, _ = distilled(tmp_path / loss, run=run, loss=loss, learning_rate=1e-12)
        assert all(value < 1e-9 for curve in losses.values() for _, value in curve)


def test_a_student_is_the_same_alone_or_among_others(tmp_path):
    together, losses, _ = distilled(tmp_path / "together")
    for interval, key in zip((FIRST, SECOND, THIRD), KEYS, strict=True):
        alone, curve, _ = distilled(tmp_path / key, interval)
        assert list(alone) == [key]
        assert equal(alone[key], together[key])
        assert curve[key] == losses[key]


def test_students_of_several_plans_are_trained_once(tmp_path):
    run = runner()
    plans = [plan_of(run, FIRST), plan_of(run, FIRST, SECOND)]
    distill_depth(run, plans, batches(), section(), desk(tmp_path))
    assert sorted(Bank(tmp_path)) == sorted(KEYS[:2])


@pytest.mark.parametrize("waiting", [None, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("inputs", ["teacher", "student", "mixed"])
def test_streamed_equals_resident_bit_by_bit(tmp_path, inputs, waiting):
    resident, losses, _ = distilled(tmp_path / "resident", inputs=inputs)
    placement = Placement(streamed=True, chunk=2, waiting=waiting)
    streamed, curves, _ = distilled(tmp_path / "streamed", run=runner(placement=placement), inputs=inputs)
    assert all(equal(resident[key], streamed[key]) for key in KEYS)
    assert losses == curves


def test_inputs_of_the_students_own_path_give_other_students(tmp_path):
    banks = {inputs: distilled(tmp_path / inputs, inputs=inputs)[:2] for inputs in ("teacher", "student", "mixed")}
    # The first student has nobody before it.
    assert all(equal(banks["teacher"][0][KEYS[0]], bank[KEYS[0]]) for bank, _ in banks.values())
    for key in KEYS[1:]:
        states = [bank[key] for bank, _ in banks.values()]
        assert not equal(states[0], states[1])
        assert not equal(states[0], states[2])
        assert not equal(states[1], states[2])
        curves = [losses[key] for _, losses in banks.values()]
        assert curves[0][:2] == curves[2][:2]  # mixed begins as the teacher's
        assert curves[0][2] != curves[2][2]


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("inputs", ["teacher", "mixed"])
def test_resumed_equals_uninterrupted_bit_by_bit(tmp_path, at, inputs):
    whole, losses, _ = distilled(tmp_path / "whole", inputs=inputs)
    with pytest.raises(Killed):
        distilled(tmp_path / "killed", wrap=lambda noised: Dying(noised, at), inputs=inputs)
    assert bool(list((tmp_path / "killed").glob("state-*"))) == (at == 3)
    seen = []
    resumed, curves, _ = distilled(tmp_path / "killed", wrap=lambda noised: Counting(noised, seen), inputs=inputs)
    assert seen == ([2, 3] if at == 3 else [0, 1, 2, 3])
    assert all(equal(whole[key], resumed[key]) for key in KEYS)
    assert curves == losses


class Counting(Dying):
    """Batches that note which of them were asked for."""

    def __init__(self, noised, seen):
        super().__init__(noised, None)
        self.seen = seen

    def __getitem__(self, number):
        self.seen.append(number)
        return super().__getitem__(number)


def test_a_segment_that_breaks_is_named_and_the_others_go_on(tmp_path):
    run = runner()
    torch.nn.init.constant_(run.transformer.transformer_blocks[3].ff.net[2].bias, float("nan"))
    bank, losses, stopped = distilled(tmp_path, FIRST, SECOND, run=run)
    assert len(stopped) == 1
    assert stopped[0].startswith("transformer_blocks.2-3 stopped at step 1: the loss is nan")
    # Its last good state is where it started.
    assert equal(bank[KEYS[1]], {n: v.float() for n, v in run.blocks(DUAL.path)[2].state_dict().items()})
    assert (len(losses[KEYS[0]]), len(losses[KEYS[1]])) == (4, 0)


def test_curves_that_another_folder_holds_are_named(tmp_path):
    (tmp_path / "losses-0.json").write_text(json.dumps({KEYS[0]: [[1, 0.5]]}))
    with pytest.raises(PpclError, match=f"has no losses of {KEYS[1]}: all processes need this folder"):
        finish(tmp_path, KEYS[:2])


def test_a_teacher_in_half_precision_has_students_in_single(tmp_path):
    run = runner()
    run.transformer.bfloat16()
    noised = batches(dtype=torch.bfloat16)
    for sample in noised.samples:
        sample.arguments.update({n: v.bfloat16() for n, v in sample.arguments.items() if "ids" not in n})
    bank, losses, stopped = distilled(tmp_path, SECOND, run=run, wrap=lambda _: noised)
    assert not stopped
    assert all(value.dtype == torch.float32 for value in bank[KEYS[1]].values())
    assert len(losses[KEYS[1]]) == 4
