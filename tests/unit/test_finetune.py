"""Fine-tuning: the student nears the teacher's velocity, and goes on bit by bit where it was killed."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from crowd import together
from runs import DUAL, SINGLE, batches, desk, equal, plan_of, runner
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Form, Interval
from ppcl_toolkit.recipe import Depth, Finetune, Width
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.finetune import finetune, load_weights, record_velocities
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.surgery.assemble import student_of
from ppcl_toolkit.training import loop
from ppcl_toolkit.training.losses import relative_mse
from ppcl_toolkit.training.targets import Velocities, answer

OPERATIONS = (
    Interval(stack=DUAL.path, first=1, last=2),
    FfnSwap(stack=DUAL.path, block=0, streams=("image", "text")),
)


class Killed(Exception):
    pass


def section(**changes):
    return Finetune(**{"steps": 5, "batch": 2, "learning_rate": 1e-3, "checkpoint_every": 2, **changes})


@pytest.fixture(scope="module")
def teacher():
    return runner()


@pytest.fixture(scope="module")
def bank(teacher, tmp_path_factory):
    folder, plans = tmp_path_factory.mktemp("bank"), [plan_of(teacher, *OPERATIONS)]
    distill_depth(teacher, plans, batches(), Depth(steps=0), desk(folder / "depth"))
    depth = Bank(folder / "depth")
    distill_width(teacher, plans, depth, batches(), Width(steps=0, batches=2), desk(folder / "width"))
    return Bank(folder / "depth", folder / "width")


def tuned(teacher, bank, folder, noised=None, operations=OPERATIONS, killed_at=None, frozen=0, **changes):
    def progress(done, _total, note=""):
        if done == killed_at:
            raise Killed(note)

    plan = plan_of(teacher, *operations)
    velocities = Velocities(desk(folder / "velocities").folder)
    asked = section(**changes)
    place = Desk(folder, progress)
    stopped = finetune(teacher, plan, bank, noised or batches(), velocities, asked, place, frozen=frozen)
    processes.wait()
    return load_weights(folder), json.loads((folder / "losses.json").read_text()), stopped


def test_the_loss_falls_and_the_student_is_nearer(teacher, bank, tmp_path):
    one = batches(count=1, size=1)
    weights, losses, stopped = tuned(teacher, bank, tmp_path, one, steps=20, learning_rate=3e-3)
    assert not stopped
    assert [step for step, _ in losses] == list(range(1, 21))
    assert sum(v for _, v in losses[-5:]) < 0.8 * sum(v for _, v in losses[:5])
    student = student_of(teacher.transformer, teacher.adapter, plan_of(teacher, *OPERATIONS), bank, one[0])
    with torch.no_grad():
        before = (student(**one[100])[0] - teacher.velocity(one[100])).square().mean()
        student.load_state_dict(weights, assign=True)
        after = (student(**one[100])[0] - teacher.velocity(one[100])).square().mean()
    assert after < before


def test_the_loss_is_the_mean_squared_velocity_error(teacher, bank, tmp_path):
    _, losses, _ = tuned(teacher, bank, tmp_path, steps=1)
    student = student_of(teacher.transformer, teacher.adapter, plan_of(teacher, *OPERATIONS), bank, batches()[0])
    with torch.no_grad():
        error = (student(**batches()[0])[0] - teacher.velocity(batches()[0])).square().mean()
    assert losses[0][1] == pytest.approx(float(error), rel=1e-5)


def of_dtype(dtype):
    """A teacher, and batches with conditioning in the dtype in which its pipeline would have made it."""
    teacher, noised = runner(), batches(dtype=dtype)
    teacher.transformer.to(dtype)
    for each in noised.samples:
        for name in ("encoder_hidden_states", "pooled_projections"):
            each.arguments[name] = each.arguments[name].to(dtype)
    return teacher, noised


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_recorded_targets_train_as_a_teacher_in_the_loop_does_bit_by_bit(tmp_path, bank, dtype, features):
    teacher, noised = of_dtype(dtype)
    plan = plan_of(teacher, *OPERATIONS)
    weights, losses, _ = tuned(teacher, bank, tmp_path, noised, features=features, warmup=0, clip=None)

    student = student_of(teacher.transformer, teacher.adapter, plan, bank, noised[0])
    for parameter in student.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    student.requires_grad_(True)
    adamw = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
    ends = [
        teacher.adapter.stack(DUAL.path).blocks(teacher.transformer)[2],
        teacher.adapter.stack(DUAL.path).blocks(student)[1],
    ]
    values, seen = [], []
    for block in ends:
        block.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    for step in range(5):
        seen.clear()
        adamw.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 5))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                wanted = teacher.transformer(**noised[step])[0]
            loss = (student(**noised[step])[0].float() - wanted.float()).square().mean()
            if features:
                text, image = (Streams(*each) for each in zip(*seen, strict=True))
                loss = loss + features * relative_mse(Streams(image[1], text[1]), Streams(image[0], text[0]))
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        values.append(float(loss.detach()))
    assert [value for _, value in losses] == values
    assert equal(weights, {name: value.to(dtype) for name, value in student.state_dict().items()})


def test_targets_are_recorded_once_for_all_sizes(teacher, bank, tmp_path, monkeypatch):
    calls = []
    own = type(teacher).velocity
    monkeypatch.setattr(type(teacher), "velocity", lambda self, batch: calls.append(1) or own(self, batch))
    other = (Interval(stack=DUAL.path, first=0, last=1), Interval(stack=DUAL.path, first=2, last=3))
    plans, asked = [plan_of(teacher, *operations) for operations in (OPERATIONS, other)], section(features=0.1)
    seen = []
    record_velocities(teacher, plans, batches(), asked, desk(tmp_path, seen))
    assert [entry[:2] for entry in seen] == [(step, 5) for step in range(1, 6)]
    velocities = Velocities(tmp_path)
    assert list(velocities[4].features) == [(DUAL.path, 2), (DUAL.path, 1), (DUAL.path, 3)]
    assert torch.equal(velocities[4].velocity, own(teacher, batches()[4]))
    finetune(teacher, plans[0], bank, batches(), velocities, asked, desk(tmp_path / "one"))
    assert len(calls) == 5
    (tmp_path / "000003.safetensors").unlink()
    record_velocities(teacher, plans, batches(), asked, desk(tmp_path))
    assert len(calls) == 6


def test_answers_that_the_disk_has_no_room_for_are_refused_at_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PpclError, match=r"answers to 5 batches take .* GB, .* fewer finetune.steps") as caught:
        record_velocities(teacher, [], batches(), section(), desk(tmp_path))
    assert "features" not in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_teacher_is_its_own_perfect_student(teacher, bank, tmp_path):
    weights, losses, _ = tuned(teacher, bank, tmp_path, operations=(), steps=1, learning_rate=1e-12)
    assert losses[0][1] == 0
    assert weights.keys() == teacher.transformer.state_dict().keys()


def test_the_teacher_stays_as_it_is_and_every_parameter_of_the_student_moves(tmp_path):
    teacher = runner()
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}
    operations = (Interval(stack=DUAL.path, first=1, last=2),)
    distill_depth(teacher, [plan_of(teacher, *operations)], batches(), Depth(steps=0), desk(tmp_path / "bank"))
    weights, _, _ = tuned(teacher, Bank(tmp_path / "bank"), tmp_path / "tuned", operations=operations)
    assert equal(before, teacher.transformer.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.transformer.parameters())
    start = student_of(
        teacher.transformer, teacher.adapter, plan_of(teacher, *operations), Bank(tmp_path / "bank"), batches()[0]
    ).state_dict()
    unmoved = [name for name, value in weights.items() if torch.equal(value, start[name])]
    assert not unmoved


@pytest.mark.parametrize("at", [1, 4])
def test_resumed_equals_uninterrupted_bit_by_bit(teacher, bank, tmp_path, at):
    whole, losses, _ = tuned(teacher, bank, tmp_path / "whole", features=0.1)

    with pytest.raises(Killed):
        tuned(teacher, bank, tmp_path / "killed", killed_at=at, features=0.1)
    assert (tmp_path / "killed" / "state.json.tmp").exists() == (at == 4)
    resumed, curve, _ = tuned(teacher, bank, tmp_path / "killed", features=0.1)
    assert equal(whole, resumed)
    assert losses == curve
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_streamed_equals_resident_bit_by_bit(teacher, bank, tmp_path):
    resident, losses, _ = tuned(teacher, bank, tmp_path / "resident", features=0.1)
    streamed, curve, _ = tuned(
        runner(placement=Placement(streamed=True, chunk=2)), bank, tmp_path / "streamed", features=0.1
    )
    assert equal(resident, streamed)
    assert losses == curve


def test_text_that_nobody_reads_is_no_feature(teacher):
    ends = [Form(DUAL.path, 2, 3), Form(SINGLE.path, 1, 2)]
    features = answer(teacher, batches(), 0, ends).features
    assert features[DUAL.path, 3].text is not None
    assert features[SINGLE.path, 2].text is None


def test_feature_terms_and_checkpointing_are_options(teacher, bank, tmp_path):
    plain, losses, _ = tuned(teacher, bank, tmp_path / "plain")
    _, with_features, _ = tuned(teacher, bank, tmp_path / "features", features=1.0)
    assert with_features[0][1] > losses[0][1]
    checkpointed, curve, _ = tuned(teacher, bank, tmp_path / "checkpointed", gradient_checkpointing=True)
    assert curve == losses
    assert equal(plain, checkpointed)


KINDS = [
    ("adamw", torch.float32),
    ("adamw", torch.bfloat16),
    ("adamw8bit", torch.bfloat16),
    ("adafactor", torch.bfloat16),
]


@pytest.mark.parametrize(("optimizer", "dtype"), KINDS)
def test_blocks_that_rest_on_the_host_learn_the_same_bit_by_bit(bank, tmp_path, optimizer, dtype):
    teacher, noised = of_dtype(dtype)
    changes = {"optimizer": optimizer, "features": 0.1, "learning_rate": 1e-2, "steps": 3}
    plain, losses, _ = tuned(teacher, bank, tmp_path / "plain", noised, offload="none", **changes)
    moved, curve, _ = tuned(teacher, bank, tmp_path / "moved", noised, offload="blocks", **changes)
    assert curve == losses
    assert equal(plain, moved)
    assert {value.dtype for value in moved.values()} == {dtype}


@pytest.mark.parametrize("offload", ["none", "blocks"])
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_lean_optimizers_go_on_bit_by_bit_where_they_were_killed(bank, tmp_path, optimizer, offload):
    teacher, noised = of_dtype(torch.bfloat16)
    changes = {"optimizer": optimizer, "offload": offload, "learning_rate": 1e-2}
    whole, losses, _ = tuned(teacher, bank, tmp_path / "whole", noised, **changes)
    with pytest.raises(Killed):
        tuned(teacher, bank, tmp_path / "killed", noised, killed_at=4, **changes)
    with pytest.raises(PpclError, match=f"was trained with optimizer {optimizer}, and adamw is chosen"):
        tuned(teacher, bank, tmp_path / "killed", noised, optimizer="adamw")
    resumed, curve, _ = tuned(teacher, bank, tmp_path / "killed", noised, **changes)
    assert curve == losses
    assert equal(whole, resumed)


def learned(weights, start):
    """Names of the blocks, and of what is outside of them, in which any weight moved."""
    moved = {name for name, value in weights.items() if not torch.equal(value, start[name])}
    return {name.split(".")[1] if name.startswith(f"{DUAL.path}.") else name.split(".")[0] for name in moved}


@pytest.mark.parametrize("offload", ["none", "blocks"])
@pytest.mark.parametrize(("optimizer", "dtype"), KINDS)
def test_first_blocks_that_are_frozen_stay_and_the_others_learn(bank, tmp_path, optimizer, dtype, offload):
    teacher, noised = of_dtype(dtype)
    changes = {"optimizer": optimizer, "frozen": 2, "learning_rate": 1e-2, "features": 0.1}
    start, _, _ = tuned(teacher, bank, tmp_path / "start", noised, steps=0)
    whole, losses, _ = tuned(teacher, bank, tmp_path / "whole", noised, **changes)
    outside = {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}
    assert learned(whole, start) == {"2", SINGLE.path, *outside}
    with pytest.raises(Killed):
        tuned(teacher, bank, tmp_path / "killed", noised, killed_at=4, offload=offload, **changes)
    resumed, curve, _ = tuned(teacher, bank, tmp_path / "killed", noised, offload=offload, **changes)
    assert curve == losses
    assert equal(whole, resumed)


def one_of_two(rank, bank, folder):
    assert processes.gathered([f"only {rank}", "both"]) == ["only 0", "both", "only 1"]
    changes = {"features": 0.1, "clip": 0.01}
    whole, losses, _ = tuned(runner(), bank, folder / "whole", **changes)
    processes.wait()
    sharded, curve, _ = tuned(runner(), bank, folder / "sharded", shard=True, **changes)
    # Norms are summed in another order, so clipped gradients may differ in their last bits.
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in losses], rel=1e-5)
    assert all(torch.allclose(value, whole[name], rtol=1e-4, atol=1e-6) for name, value in sharded.items())
    processes.wait()

    with pytest.raises(Killed):
        tuned(runner(), bank, folder / "killed", killed_at=4, shard=True, **changes)
    processes.wait()
    resumed, again, _ = tuned(runner(), bank, folder / "killed", shard=True, gradient_checkpointing=True, **changes)
    assert curve == again
    assert equal(sharded, resumed)
    processes.wait()

    start, _, _ = tuned(runner(), bank, folder / "start", steps=0)
    changes = {"frozen": 2, "clip": None, "warmup": 0}
    whole, losses, _ = tuned(runner(), bank, folder / "frozen", **changes)
    processes.wait()
    with pytest.raises(Killed):
        tuned(runner(), bank, folder / "thawed", killed_at=4, shard=True, **changes)
    processes.wait()
    sharded, curve, _ = tuned(runner(), bank, folder / "thawed", shard=True, **changes)
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in losses], rel=1e-5)
    assert learned(sharded, start) == learned(whole, start)
    assert not {"0", "1"} & learned(sharded, start)


def test_sharded_over_two_processes_equals_whole_students_in_each(bank, tmp_path):
    together(2, one_of_two, bank, tmp_path)


class Exchanged(TorchDispatchMode):
    """Notes the dtypes of what processes gather and add up, by operation."""

    def __init__(self):
        super().__init__()
        self.dtypes = {"allgather": set(), "reduce_scatter": set()}

    def __torch_dispatch__(self, function, _, arguments=(), options=None):
        for name, found in self.dtypes.items():
            if function.namespace == "c10d" and name in function.name():
                found |= {value.dtype for value in pytree.tree_leaves(arguments) if isinstance(value, torch.Tensor)}
        return function(*arguments, **(options or {}))


def one_of_two_in_half(_, bank, folder):
    teacher, noised = of_dtype(torch.bfloat16)
    whole, losses, _ = tuned(teacher, bank, folder / "whole", noised)
    start, _, _ = tuned(teacher, bank, folder / "start", noised, steps=0)
    processes.wait()
    with Exchanged() as exchanged:
        sharded, curve, _ = tuned(teacher, bank, folder / "sharded", noised, shard=True)
    assert exchanged.dtypes == {"allgather": {torch.bfloat16}, "reduce_scatter": {torch.float32}}
    # Weights are rounded where they are gathered, and where autocast takes them: by one rounding more at each step.
    assert curve[0] == losses[0]
    for (step, loss), (_, other) in zip(curve, losses, strict=True):
        assert loss == pytest.approx(other, rel=step * torch.finfo(torch.bfloat16).eps)
    assert apart(sharded, whole) < 0.1 * apart(whole, start)


def apart(one, other):
    """The norm of the difference of two state dicts."""
    return sum(float((value.double() - other[name].double()).square().sum()) for name, value in one.items()) ** 0.5


def test_of_a_half_precision_teacher_halves_are_gathered_and_gradients_averaged_in_single(bank, tmp_path):
    together(2, one_of_two_in_half, bank, tmp_path)


def test_a_loss_that_breaks_keeps_the_last_good_state(teacher, bank, tmp_path, monkeypatch):
    class Breaking:
        dtype = torch.float32

        def __getitem__(self, number):
            batch = batches()[number]
            return {**batch, "hidden_states": batch["hidden_states"] * float("nan")} if number == 5 else batch

    # The same schedule of the learning rate, cut off after five good steps.
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 1e-3)
    steady, _, _ = tuned(teacher, bank, tmp_path / "steady", steps=5)
    broken, losses, stopped = tuned(teacher, bank, tmp_path / "broken", Breaking(), steps=9)
    assert stopped == ["fine-tuning stopped at step 6: the loss is nan; its last good state is kept"]
    assert len(losses) == 5
    assert equal(broken, steady)
