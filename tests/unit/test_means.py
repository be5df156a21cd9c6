"""The means of fine-tuning are the first that fit; what each takes is a sum that can be done by hand."""

import importlib.util

import pytest
import torch
from torch import nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.training.means import Job, Machine, check_optimizer, choose_means, job_of, means_of

GB = 10**9
FLUX = Job(  # 8B, batch 4 at 1024 pixels, blocks computing again
    params=7_908_486_464,
    block_params=7_844_361_472,
    largest_block=339_831_296,
    largest_weight=56_623_104,
    activations=15_744_288_768,
    block_inputs=15_744_288_768,
)
QWEN = Job(
    params=10_235_462_208,
    block_params=10_194_938_880,
    largest_block=339_831_296,
    largest_weight=56_623_104,
    activations=13_503_580_160,
    block_inputs=13_503_580_160,
)


def card(device, host, ranks=1, *, shard=False):
    return Machine(device_bytes=device * GB, host_bytes=host * GB, ranks=ranks, shard=shard)


@pytest.mark.parametrize(
    ("job", "machine", "chosen"),
    [
        (FLUX, card(183, 256), ("adamw", "none")),
        (FLUX, card(80, 64), ("adamw8bit", "none")),
        (FLUX, card(48, 64), ("adamw8bit", "blocks")),
        (FLUX, card(24, 64), ("adamw8bit", "blocks")),
        (FLUX, card(24, 24), ("adafactor", "blocks")),
        (FLUX, card(48, 32), ("adafactor", "none")),
        (FLUX, card(80, 64, ranks=8, shard=True), ("adamw", "none")),
        (FLUX, card(48, 64, ranks=8, shard=True), ("adamw", "none")),
        (QWEN, card(80, 128), ("adamw8bit", "none")),
        (QWEN, card(24, 128), ("adamw8bit", "blocks")),
        (QWEN, card(80, 64, ranks=8, shard=True), ("adamw", "none")),
        (QWEN, card(48, 64, ranks=8, shard=True), ("adamw", "none")),
        (QWEN, card(80, 16, ranks=8), ("adamw8bit", "none")),
        (QWEN, card(80, 64, ranks=2, shard=True), ("adamw8bit", "none")),
    ],
)
def test_jobs_and_machines_that_people_have(job, machine, chosen):
    means = choose_means(job, machine)
    assert (means.optimizer, means.offload) == chosen
    assert means.bytes_on_device < machine.device_bytes
    assert means.bytes_on_host < machine.host_bytes


def test_the_sums_are_those_of_the_study():
    none, machine = {"activations": 0, "block_inputs": 0, "largest_weight": 0, "largest_block": 0}, card(80, 64)
    job = Job(params=8 * GB, block_params=7 * GB, half=True, **none)
    device = {kind: means_of(job, machine, kind, "none").bytes_on_device / GB for kind in ("adamw8bit", "adafactor")}
    assert device == pytest.approx({"adamw8bit": 32.56, "adafactor": 16.16})
    assert means_of(job, machine, "adamw", "none").bytes_on_device == 16 * 8 * GB
    moved = means_of(job, machine, "adamw8bit", "blocks")
    assert (moved.bytes_on_device, moved.bytes_on_host) == pytest.approx((4.07 * GB, 4.07 * 7 * GB))
    spread = means_of(job, card(80, 64, ranks=8, shard=True), "adamw", "none")
    assert spread.bytes_on_device == 16 * GB


def test_what_is_asked_for_by_name_is_taken_at_its_word_and_what_cannot_be_is_refused():
    assert choose_means(FLUX, card(8, 8), "adamw", "none").optimizer == "adamw"
    assert choose_means(FLUX, card(24, 64), "adafactor").offload == "blocks"
    with pytest.raises(PpclError, match=r"fits in no way: there are 8.0 GB .* optimizer adafactor, offload blocks: "):
        choose_means(FLUX, card(8, 64))
    with pytest.raises(PpclError, match="adafactor with finetune.offload: auto is not for 8 processes that share"):
        choose_means(FLUX, card(80, 64, ranks=8, shard=True), "adafactor")
    with pytest.raises(PpclError, match="adamw with finetune.offload: blocks is not for 2 processes"):
        choose_means(FLUX, card(80, 640, ranks=2), "adamw", "blocks")


def test_activations_are_what_autograd_keeps():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(8, 16, device="meta")
            self.blocks = nn.ModuleList(nn.Linear(16, 16, device="meta") for _ in range(3))

        def forward(self, x):
            x = self.enter(x)
            for block in self.blocks:
                x = block(x).relu()
            return x.sum()

    model, x = Model(), torch.zeros(2, 5, 8, device="meta")
    kept = job_of(model, list(model.blocks), lambda: model(x), recomputed=False)
    # The model's input, and what each Linear and each ReLU keeps, one storage for both where it is the same.
    assert kept.activations == 4 * 10 * (8 + 16 + 3 * 16)
    again = job_of(model, list(model.blocks), lambda: model(x), recomputed=True)
    assert again.activations == kept.block_inputs == again.block_inputs
    assert (kept.params, kept.block_params, kept.largest_block, kept.largest_weight) == (960, 816, 272, 256)


def test_an_optimizer_that_is_not_installed_is_not_chosen_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose_means(FLUX, card(80, 64)).optimizer != "adamw8bit"
    check_optimizer("auto")
    with pytest.raises(PpclError, match=r"adamw8bit needs the package torchao: pip install 'ppcl-toolkit\[lowmem\]'"):
        check_optimizer("adamw8bit")
    with pytest.raises(PpclError, match=r"with ppcl-toolkit\[lowmem\] there is adamw8bit, too"):
        choose_means(FLUX, card(8, 8))
