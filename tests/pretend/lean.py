"""Training on the pretended device in less memory than weights and moments take: `test_lean.py` starts it."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from runs import DUAL, SINGLE, batches, desk, equal, plan_of, runner
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ppcl_toolkit.artifacts.storage import Bank
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval
from ppcl_toolkit.recipe import Depth, Finetune, Width
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.finetune import finetune, load_weights
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.means import Job, Machine, means_of
from ppcl_toolkit.training.offload import Offload
from ppcl_toolkit.training.targets import Velocities

WIDTH, BLOCKS, TOKENS = 256, 12, 4
MEMORY = 80_000_000
KINDS = ("adamw", "adamw8bit", "adafactor")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, scale):
        return x + scale * self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, scale=self.scale * 0.1)
        return self.leave(x)


def trained(kind, device, offload, steps=3, dtype=None):
    """The losses, the weights and the most memory of a training."""
    gc.collect()
    dtype = dtype or (torch.float32 if kind == "adamw" else torch.bfloat16)
    tower, device = Tower().to(dtype), torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if not offload:
        tower.to(device)
    section = Finetune(steps=10, learning_rate=1e-3, warmup=0, clip=0.5)
    optimization = Optimization("it", [tower], section, optimizer=kind, device=device)
    if offload:
        Offload(tower, tower.blocks, optimization.rule, device)
    for step in range(steps):
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step)).to(device, dtype)
        optimization.step((tower(x) - x.flip(-1)).float().square().mean())
        assert not optimization.stopped
        if offload:
            assert {parameter.device.type for parameter in tower.blocks.parameters()} == {"cpu"}
    most = torch.cuda.max_memory_allocated() - before
    weights = {name: value.detach().cpu() for name, value in tower.state_dict().items()}
    return [loss for _, loss in optimization.losses], weights, most


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_come_and_go_learn_what_blocks_that_stay_learn(kind):
    stay, weights, much = trained(kind, "cuda", offload=False)
    come, others, little = trained(kind, "cuda", offload=True)
    assert stay == come
    # The host's own AdamW sums in another order than the fused kernel of a device.
    close = {"rtol": 0, "atol": 1e-6} if kind == "adamw" else {"rtol": 0, "atol": 0}
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, **close)
    assert little < much / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", [False, True])
def test_a_training_takes_what_was_planned(kind, offload):
    params = sum(p.numel() for p in Tower().parameters())
    block = sum(p.numel() for p in Block().parameters())
    job = Job(
        params=params,
        block_params=BLOCKS * block,
        largest_block=block,
        largest_weight=4 * WIDTH * WIDTH,
        activations=0,
        block_inputs=0,
        half=kind != "adamw",
    )
    machine = Machine(device_bytes=MEMORY, host_bytes=MEMORY)
    planned = means_of(job, machine, kind, "blocks" if offload else "none").bytes_on_device
    _, _, most = trained(kind, "cuda", offload=offload)
    assert 0.5 * planned < most < 1.15 * planned


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_learns_what_the_host_learns(kind):
    there, weights, _ = trained(kind, "cuda", offload=True)
    here, others, _ = trained(kind, "cpu", offload=True)
    assert there == pytest.approx(here, rel=1e-3)
    # Rounded up on one, rounded down on the other: a step of bf16.
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("optimizer", "streamed"), [("adamw", False), ("adamw8bit", True), ("adafactor", False)])
def test_fine_tuning_on_a_card_gives_the_hosts_student(tmp_path, optimizer, streamed):
    operations = (Interval(stack=DUAL.path, first=1, last=2),)
    results = []
    for name, offload, placement in (
        ("host", "none", Placement()),
        ("card", "none", Placement(device=torch.device("cuda"), streamed=streamed)),
        ("moved", "blocks", Placement(device=torch.device("cuda"), streamed=streamed)),
    ):
        run = runner(placement=placement)
        plan, bank = plan_of(run, *operations), tmp_path / name / "bank"
        distill_depth(run, [plan], batches(), Depth(steps=0), desk(bank))
        section = Finetune(
            steps=3, batch=2, learning_rate=1e-3, features=0.1, optimizer=optimizer, offload=offload, warmup=0
        )
        velocities = Velocities(desk(tmp_path / name / "velocities").folder)
        said = finetune(run, plan, Bank(bank), batches(), velocities, section, desk(tmp_path / name))
        assert not said
        assert {p.device.type for p in run.transformer.parameters()} == {"cpu"}
        results.append(load_weights(tmp_path / name))
    host, card, moved = results
    for name, value in host.items():
        torch.testing.assert_close(card[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved[name], card[name], rtol=0, atol=1e-6 if optimizer == "adamw" else 0)


def test_what_fits_is_chosen_and_said_and_what_fits_in_no_way_is_refused(tmp_path, monkeypatch):
    run = runner(placement=Placement(device=torch.device("cuda")))
    plan, section = plan_of(run), Finetune(steps=1, batch=2)
    velocities = Velocities(desk(tmp_path / "velocities").folder)
    assert finetune(run, plan, Bank(), batches(), velocities, section, desk(tmp_path / "roomy")) == []

    student = 4 * sum(p.numel() for p in run.transformer.parameters())
    small = SimpleNamespace(total_memory=int(2.5 * student))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    (said,) = finetune(run, plan, Bank(), batches(), velocities, section, desk(tmp_path / "small"))
    assert "fine-tuning is made to fit: optimizer adamw8bit, offload blocks" in said
    small.total_memory = 1000
    with pytest.raises(PpclError, match=r"fits in no way: there are 0.0 GB of the device .* optimizer adafactor"):
        finetune(run, plan, Bank(), batches(), velocities, section, desk(tmp_path / "none"))


CARD = torch.device("cuda")
PLACEMENTS = {
    "resident": Placement(device=CARD),
    "streamed": Placement(device=CARD, streamed=True),
    "in files": Placement(device=CARD, streamed=True, chunk=2, waiting=0),
}


@pytest.fixture
def steps():
    """Of every step of an optimizer: whether one kernel did it, and where its counts of steps were."""
    seen = []

    def note(optimizer, *_):
        seen.append((optimizer.defaults["fused"], {state["step"].device.type for state in optimizer.state.values()}))

    handle = register_optimizer_step_post_hook(note)
    yield seen
    handle.remove()


class Killed(Exception):
    pass


class Dying:
    """Batches that end the process, so to speak, at one of their numbers."""

    def __init__(self, at):
        self.noised, self.at = batches(), at
        self.dtype = self.noised.dtype

    def __call__(self, start, stop):
        return self.noised(start, stop)

    def __getitem__(self, number):
        if number == self.at:
            raise Killed
        return self.noised[number]


def distilled(folder, placement, die_at=None):
    """Students of two intervals and a linear FFN, four steps each."""
    run, noised = runner(placement=placement), Dying(die_at)
    plan = plan_of(
        run,
        Interval(stack=DUAL.path, first=0, last=1),
        Interval(stack=SINGLE.path, first=0, last=2),
        FfnSwap(stack=DUAL.path, block=3, streams=("image", "text")),
    )
    section = {"steps": 4, "learning_rate": 1e-3, "checkpoint_every": 2}
    said = distill_depth(run, [plan], noised, Depth(**section), desk(folder / "depth"))
    said += distill_width(
        run, [plan], Bank(folder / "depth"), noised, Width(**section, batches=16), desk(folder / "width")
    )
    assert not said
    bank = Bank(folder / "depth", folder / "width")
    curves = [json.loads((folder / stage / "losses.json").read_text()) for stage in ("depth", "width")]
    return {key: bank[key] for key in bank}, {k: [loss for _, loss in c] for both in curves for k, c in both.items()}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_segments_step_by_one_kernel_wherever_they_wait(tmp_path, steps, name):
    _, host = distilled(tmp_path / "host", Placement())
    assert steps
    assert not any(fused for fused, _ in steps)
    steps.clear()
    _, card = distilled(tmp_path / "card", PLACEMENTS[name])
    assert steps == [(True, {"cuda"})] * 12
    assert card.keys() == host.keys()
    for key, losses in card.items():
        assert losses == pytest.approx(host[key], rel=1e-3)


@pytest.mark.parametrize("before", ["host", *PLACEMENTS])
@pytest.mark.parametrize("after", PLACEMENTS)
def test_segments_go_on_from_a_state_of_another_place(tmp_path, steps, before, after):
    whole, curves = distilled(tmp_path / "whole", PLACEMENTS[after])
    with pytest.raises(Killed):
        distilled(tmp_path / "killed", PLACEMENTS.get(before, Placement()), die_at=3)
    assert list((tmp_path / "killed" / "depth").glob("state-*-2.safetensors.tmp"))
    steps.clear()
    resumed, losses = distilled(tmp_path / "killed", PLACEMENTS[after])
    assert steps == [(True, {"cuda"})] * 8
    for key, weights in whole.items():
        assert before == "host" or equal(resumed[key], weights), key
        assert losses[key] == pytest.approx(curves[key], rel=1e-3)
