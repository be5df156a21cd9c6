from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from ppcl_toolkit.shapes.flow import Pool, TextToLatent, put_weights, tokenize
from ppcl_toolkit.shapes.loop import Settings, Trainer, share_gradients, world
from ppcl_toolkit.shapes.progress import save_atomically
from ppcl_toolkit.shapes.scenes import evaluation_prompts
from ppcl_toolkit.shapes.train import averaged_model, flow_loss, guidance_loss

CPU = torch.device("cpu")
SETTINGS = Settings(minutes=1, samples=40, batch=4)


@pytest.fixture
def run(tmp_path):
    t5_ids, clip_ids = tokenize(evaluation_prompts(2))
    torch.manual_seed(1)
    shard = {"latents": torch.randn(14, 16, 32).bfloat16(), "t5_ids": t5_ids, "clip_ids": clip_ids}
    (tmp_path / "pool").mkdir()
    save_atomically(shard, tmp_path / "pool" / "0000.safetensors")
    return tmp_path


def trainer_of(run, steps):
    torch.manual_seed(0)
    model = TextToLatent()
    for stack in ("transformer_blocks", "single_transformer_blocks"):
        setattr(model.transformer, stack, getattr(model.transformer, stack)[:2])
    trainer = Trainer(run, "flow", model, SETTINGS)
    empty = tuple(ids.long() for ids in tokenize([""]))
    pool = Pool(run, CPU)
    for _ in range(steps):
        trainer.advance(pool, partial(flow_loss, model=model, empty=empty, block_dropout=0.2))
    return trainer


def test_resumed_equals_uninterrupted(run):
    straight = trainer_of(run, 3)
    trainer_of(run, 2).save()
    resumed = trainer_of(run, 1)
    assert resumed.step == straight.step == 3 and resumed.samples == 12
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, average in straight.average.items():
        assert torch.equal(resumed.average[name], average)


def test_a_nan_stops_the_training(run):
    trainer = trainer_of(run, 0)
    with pytest.raises(FloatingPointError, match="flow"):
        trainer.advance(Pool(run, CPU), lambda *_: next(trainer.model.parameters()).sum() * torch.nan)


def test_guidance_of_one_is_what_the_frozen_model_does(run, monkeypatch):
    monkeypatch.setattr("ppcl_toolkit.shapes.train.GUIDANCE_RANGE", (1.0, 1.0))
    model = TextToLatent()
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    save_atomically({"average": dict(model.named_parameters())}, run / "flow.safetensors")
    frozen, student = averaged_model(run, "flow"), averaged_model(run, "flow")
    empty = tuple(ids.long() for ids in tokenize([""]))
    batch = Pool(run, CPU).draw(4, np.random.default_rng(0))
    arguments = (batch, np.random.default_rng(0), torch.Generator().manual_seed(0))
    loss = guidance_loss(*arguments, models=(student, frozen), empty=empty, block_dropout=0.0)
    assert loss.item() < 1e-9


def test_a_missing_checkpoint_or_pool_says_which_phase_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="phase 'flow'"):
        averaged_model(tmp_path, "flow")
    with pytest.raises(FileNotFoundError, match="phase 'pool'"):
        Pool(tmp_path, CPU)


def test_weights_of_another_model_are_refused():
    with pytest.raises(AssertionError):
        put_weights(TextToLatent(), {"something.else": torch.zeros(1)})


def one_of_two(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    # One process leaves the second layer out, as a dropped block is.
    model[rank].weight.grad = torch.full_like(model[rank].weight, 4.0)
    share_gradients(model)
    assert world() == (rank, 2)
    assert all((p.grad == 2).all() for p in model.parameters())
    dist.destroy_process_group()


def test_processes_share_their_gradients(tmp_path):
    multiprocessing.spawn(one_of_two, args=(tmp_path / "store",), nprocs=2)
    assert world() == (0, 1)
