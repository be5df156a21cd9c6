"""A training that is spread over processes goes on, on another number of them, with the same weights to the bit."""

import shutil

import pytest
import torch
from crowd import together
from safetensors.torch import load_file
from torch import nn

from ppcl_toolkit import processes
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Finetune
from ppcl_toolkit.training import shards
from ppcl_toolkit.training.checkpoint import load_result, load_training, save_result, save_training, steps_done
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.lowbit import plain
from ppcl_toolkit.training.shards import Saved, local, shard

SECTION = Finetune(steps=20, learning_rate=1e-2, warmup=0, clip=None)
KINDS = ("adamw", "adamw8bit")


def network(seed=0):
    torch.manual_seed(seed)
    # 130 rows are 44, 44, 42 for three; one output is nobody's but the first one's.
    return nn.Sequential(nn.Linear(256, 130), nn.GELU(), nn.Linear(130, 1))


def trained(module, optimization, steps):
    for step in steps:
        x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
        optimization.step((module(x) - x[:, :1]).square().mean())


def made(kind, seed, *, spread):
    module = network(seed)
    if spread:
        shard([module[0], module], torch.device("cpu"), torch.float32, prepare=lambda _: None)
    return module, Optimization("it", [module], SECTION, optimizer=kind)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def process(_, ranks, folder, writes):
    for kind in KINDS:
        module, optimization = made(kind, 0 if writes else 5, spread=ranks > 1)
        (folder / kind).mkdir(exist_ok=True)
        if writes:
            trained(module, optimization, range(4))
            save_training(folder / kind, module, optimization)
        else:
            assert steps_done(folder / kind) == 4
            load_training(folder / kind, module, optimization)
        check(folder / kind, kind, module, optimization)
        if not writes:
            trained(module, optimization, range(4, 8))
            assert [step for step, _ in optimization.losses] == list(range(1, 9))
            save_result(folder / kind, module, torch.bfloat16)
        processes.wait()


def check(folder, kind, module, optimization):
    """Compare weights and moments with those of one process, gathered here and nowhere else."""
    alone, reference = made(kind, 0, spread=False)
    trained(alone, reference, range(4))
    weights = {name: whole(value) for name, value in module.state_dict().items()}
    first = folder / "first.pt"
    processes.wait()
    if not first.exists() and processes.is_main():
        torch.save(weights, first)
    processes.wait()
    written = torch.load(first)
    assert all(torch.equal(value, written[name]) for name, value in weights.items())
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-4 if kind == "adamw" else 5e-3)
    for index, parameter in enumerate(optimization.rule.parameters):
        for key in ("exp_avg", "exp_avg_sq"):
            own, other = (whole(rule.state(index)[key]) for rule in (optimization.rule, reference.rule))
            own, other = local(plain(own)), plain(other)
            if own.shape == other.shape:
                close = (
                    {"rtol": 1e-4, "atol": 1e-6}
                    if kind == "adamw"
                    else {"rtol": 0.2, "atol": float(other.abs().max()) / 50}
                )
                torch.testing.assert_close(own, other, **close)
            assert own.shape == local(parameter).shape or own.shape == parameter.shape


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    together(2, process, 2, folder, True)
    return folder


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_another_number_of_processes_goes_on(written, tmp_path, readers):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    assert len(list((tmp_path / "adamw").glob("state-*.safetensors.tmp"))) == 2
    # Each wrote its own rows, and no more.
    saved = Saved(tmp_path / "adamw", "state", suffix=".tmp")
    assert [saved.part(rank, "weights/0.weight").shape[0] for rank in range(2)] == [65, 65]
    together(readers, process, readers, tmp_path, False)
    for kind in KINDS:
        result = load_result(tmp_path / kind)
        assert {name: value.shape for name, value in result.items()} == {
            name: value.shape for name, value in network().state_dict().items()
        }
        assert {value.dtype for value in result.values()} == {torch.bfloat16}
        assert not list((tmp_path / kind).glob("*.tmp"))


def test_the_index_is_last_and_what_is_damaged_is_named(tmp_path):
    module, optimization = made("adamw", 0, spread=False)
    trained(module, optimization, range(2))
    save_training(tmp_path, module, optimization)
    trained(module, optimization, range(2, 4))
    save_training(tmp_path, module, optimization)
    (weights,) = tmp_path.glob("state-*.safetensors.tmp")
    assert "00000004" in weights.name
    with pytest.raises(PpclError, match="was trained with optimizer adamw, and adafactor is chosen here"):
        load_training(tmp_path, *made("adafactor", 1, spread=False))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PpclError, match=r"state.json.tmp or its files are damaged"):
        load_training(tmp_path, *made("adamw", 1, spread=False))


def test_files_are_closed_when_they_are_large_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_FILE_BYTES", 48)
    given = {f"{number}": torch.full((number + 1,), float(number)) for number in range(7)}
    shards.save(tmp_path, "it", (shards.Part(name, value) for name, value in given.items()), {"mark": "a"})
    sizes = [[*load_file(path)] for path in sorted(tmp_path.glob("it-*.safetensors"))]
    # 4, 8, 12, 16, 20, 24 and 28 bytes: each file ends with what makes it 48 or more.
    assert sizes == [["0", "1", "2", "3", "4"], ["5", "6"]]
    assert all(torch.equal(Saved(tmp_path, "it").read(name), value) for name, value in given.items())
