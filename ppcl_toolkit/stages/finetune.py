"""Stages `velocities` and `finetune`: the whole student learns the teacher's velocity, all at once (Sec. 4.1).

What the teacher says to the seeded batches is recorded first, once for all sizes; then each student trains alone.

finetune: {steps: 1000, batch: 4, learning_rate: 1.0e-5, features: 0.0}
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Finetune
from ppcl_toolkit.running.capture import predict, unpadded
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.numbers import emptied
from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import student_blocks, student_of
from ppcl_toolkit.surgery.copies import meta_copy
from ppcl_toolkit.training import loop
from ppcl_toolkit.training.checkpoint import load_result, load_training, save_result, save_training, steps_done
from ppcl_toolkit.training.losses import LOSSES, without_padding
from ppcl_toolkit.training.means import Means, choose_means, job_of, machine_of
from ppcl_toolkit.training.offload import Offload
from ppcl_toolkit.training.segment import comparable
from ppcl_toolkit.training.shards import shard
from ppcl_toolkit.training.targets import Target, Velocities, interval_ends, outputs, record


def record_velocities(runner: Runner, plans: Sequence[Plan], batches: Batches, section: Finetune, desk: Desk) -> None:
    """Write what the teacher says to every batch of fine-tuning, shared out over the processes.

    With `features`, the streams at the ends of the intervals of all `plans` belong to it. What is there is kept.
    """
    rank, ranks = processes.world()
    ends = interval_ends(plans) if section.features else []
    numbers = range(rank, section.steps * ranks, ranks)
    for done in record(runner, batches, numbers, Velocities(desk.folder), ends):
        desk.progress(done, section.steps)


def finetune(  # noqa: PLR0913 - the last is for comparisons
    runner: Runner,
    plan: Plan,
    bank: Bank,
    batches: Batches,
    velocities: Velocities,
    section: Finetune,
    desk: Desk,
    *,
    frozen: int = 0,
) -> list[str]:
    """Assemble the student of `plan`, train it and write its weights; return why it stopped early, if it did.

    The loss is the mean squared velocity error, plus `features` times the depth loss at the end of every interval.
    Targets that are not among `velocities` any more are recorded again. The first `frozen` blocks of the student do not
    learn.
    """
    rank, ranks = processes.world()
    numbers = range(steps_done(desk.folder) * ranks + rank, section.steps * ranks, ranks)
    for _ in record(runner, batches, numbers, velocities, interval_ends([plan]) if section.features else []):
        pass
    # The teacher is not needed any more, and its place on the device is.
    runner.leave()
    student = student_of(runner.transformer, runner.adapter, plan, bank, batches[0])
    student.requires_grad_(True)
    for block, _ in student_blocks(student, runner.adapter, plan)[:frozen]:
        block.requires_grad_(False)
    means = _means(runner, plan, student, batches, section)
    why = _said(means, section)
    desk.progress(0, section.steps, why)
    optimization = _prepared(runner, plan, student, means, section, batches.dtype)
    load_training(desk.folder, student, optimization)
    for number in numbers:
        with loop.autocast(runner.placement.device, batches.dtype):
            batch, target = runner.placement.bring(batches[number]), velocities[number].to(runner.placement.device)
            loss = _loss(runner, student, plan, batch, target, section)
        optimization.step(loss)
        if optimization.stopped:
            break
        if optimization.done % section.checkpoint_every == 0:
            save_training(desk.folder, student, optimization)
        desk.progress(optimization.done, section.steps, f"loss {optimization.losses[-1][1]:.4g}")
    save_result(desk.folder, student, batches.dtype)
    if processes.is_main():
        (desk.folder / "losses.json").write_text(json.dumps(optimization.losses))
    return [said for said in (why, optimization.stopped) if said]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the state dict of a fine-tuned student."""
    return load_result(folder)


def _means(runner: Runner, plan: Plan, student: nn.Module, batches: Batches, section: Finetune) -> Means:
    device, (_, ranks) = runner.placement.device, processes.world()
    if device.type == "cpu":
        return Means(
            "adamw" if section.optimizer == "auto" else section.optimizer, section.offload.replace("auto", "none")
        )
    empty = meta_copy(student).requires_grad_(True)
    blocks = [block for block, _ in student_blocks(empty, runner.adapter, plan)]
    call = partial(empty, **emptied(dict(batches[0])))
    job = job_of(empty, blocks, call, recomputed=section.gradient_checkpointing)
    return choose_means(job, machine_of(device, ranks, shard=section.shard), section.optimizer, section.offload)


def _said(means: Means, section: Finetune) -> str:
    """Return what a user should know of means that were not asked for."""
    chosen = "auto" in (section.optimizer, section.offload) and (means.optimizer, means.offload) != ("adamw", "none")
    return f"fine-tuning is made to fit: {means}" if chosen and means.bytes_on_device else ""


def _prepared(
    runner: Runner, plan: Plan, student: nn.Module, means: Means, section: Finetune, dtype: torch.dtype
) -> loop.Optimization:
    """Give a student weights of its own, where it learns, and return what trains it."""
    device, spread = runner.placement.device, section.shard and processes.world()[1] > 1
    blocks = [block for block, _ in student_blocks(student, runner.adapter, plan)]
    exact = means.optimizer == "adamw" or dtype != torch.bfloat16
    # What is spread over the processes, or rests on the host, need not be whole on any device.
    place = HOST if spread or means.offload == "blocks" else device
    own = partial(_own, device=place, dtype=torch.float32 if exact else dtype)
    student.train()
    if section.gradient_checkpointing and means.offload == "none":
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    if spread:
        shard([*blocks, student], device, dtype, prepare=own)
    else:
        own(student)
    optimization = loop.Optimization("fine-tuning", [student], section, optimizer=means.optimizer, device=device)
    if means.offload == "blocks":
        Offload(student, blocks, optimization.rule, device)
    return optimization


def _own(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Copy weights: until here what is the teacher's shares its memory. What is spread already has its own."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, dtype, copy=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device, copy=True)


def _loss(
    runner: Runner, student: nn.Module, plan: Plan, batch: dict[str, Any], target: Target, section: Finetune
) -> Tensor:
    ends = interval_ends([plan]) if section.features else []
    own = {form: block for block, form in student_blocks(student, runner.adapter, plan)}
    with outputs([(own[form], runner.adapter.stack(form.stack)) for form in ends]) as found:
        loss = functional.mse_loss(predict(student, runner.adapter, batch).float(), target.velocity.float())
    for form, output in zip(ends, found, strict=True):
        aim, mask = target.features[form.stack, form.last], unpadded(runner.adapter.stack(form.stack), batch)
        ours = comparable(form, output, aim)
        loss = loss + section.features * without_padding(LOSSES[section.feature_loss], ours, aim, mask)
    return loss
