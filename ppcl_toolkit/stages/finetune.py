"""Stage `finetune`: the whole student learns the teacher's velocity, every parameter at once (Sec. 4.1).

finetune: {steps: 1000, batch: 4, learning_rate: 1.0e-5, features: 0.0}
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.artifacts.storage import Bank, Desk, load_tree, save_tree
from ppcl_toolkit.plan import Form, Plan
from ppcl_toolkit.recipe import Finetune
from ppcl_toolkit.running.capture import Streams, predict, unpack
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import student_blocks, student_of
from ppcl_toolkit.training import loop
from ppcl_toolkit.training.losses import LOSSES
from ppcl_toolkit.training.segment import comparable

_WEIGHTS = "transformer.safetensors"


def finetune(runner: Runner, plan: Plan, bank: Bank, batches: Batches, section: Finetune, desk: Desk) -> list[str]:
    """Assemble the student of `plan`, train it and write its weights; return why it stopped early, if it did.

    The loss is the mean squared velocity error, plus `features` times the depth loss at the end of every interval.
    """
    student = _student(runner, plan, bank, batches, section)
    parts = {"student": (student, loop.Optimization("fine-tuning", [student], section))}
    optimization = parts["student"][1]
    state = desk.folder / "state.safetensors.tmp"
    rank, ranks = processes.world()
    for step in range(loop.load_state(state, parts), section.steps):
        with loop.autocast(runner.placement.device, batches.dtype):
            batch = runner.placement.bring(batches[step * ranks + rank])
            loss = _loss(runner, student, plan, batch, section)
        optimization.step(loss)
        if optimization.stopped:
            break
        if optimization.done % section.checkpoint_every == 0:
            loop.save_state(state, optimization.done, parts, write=processes.is_main())
        desk.progress(optimization.done, section.steps, f"loss {optimization.losses[-1][1]:.4g}")
    weights = {name: loop.whole(value).to(batches.dtype) for name, value in student.state_dict().items()}
    if processes.is_main():
        save_tree(desk.folder / _WEIGHTS, weights)
        (desk.folder / "losses.json").write_text(json.dumps(optimization.losses))
        state.unlink(missing_ok=True)
    return [optimization.stopped] if optimization.stopped else []


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the state dict of a fine-tuned student."""
    weights: dict[str, Tensor] = load_tree(folder / _WEIGHTS)
    return weights


def _student(runner: Runner, plan: Plan, bank: Bank, batches: Batches, section: Finetune) -> nn.Module:
    """Assemble a student, with fp32 masters and ready to train."""
    student = student_of(runner.transformer, runner.adapter, plan, bank, batches[0])
    if section.shard:
        student.cpu()  # what is spread over the processes need not be whole on any device
    for parameter in student.parameters():
        # Masters of its own: until here what is the teacher's shares its memory.
        parameter.data = parameter.data.to(torch.float32, copy=True)
    student.requires_grad_(True).train()
    if section.gradient_checkpointing:
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    if section.shard:
        blocks = [block for block, _ in student_blocks(student, runner.adapter, plan)]
        loop.shard(student, blocks, runner.placement.device)
    return student.to(runner.placement.device)


def _loss(runner: Runner, student: nn.Module, plan: Plan, batch: dict[str, Any], section: Finetune) -> Tensor:
    ends = [form for form in plan.forms() if form.last > form.first] if section.features else []
    teacher_blocks = [(runner.blocks(f.stack)[f.last], runner.adapter.stack(f.stack)) for f in ends]
    own = {form: block for block, form in student_blocks(student, runner.adapter, plan)}
    student_ends = [(own[form], stack) for form, (_, stack) in zip(ends, teacher_blocks, strict=True)]
    with _outputs(teacher_blocks) as wanted:
        velocity = runner.velocity(batch)
    with _outputs(student_ends) as found:
        loss = functional.mse_loss(predict(student, runner.adapter, batch).float(), velocity.float())
    for form, output, target in zip(ends, found, wanted, strict=True):
        loss = loss + section.features * _feature(form, output, target, section)
    return loss


def _feature(form: Form, output: Streams, target: Streams, section: Finetune) -> Tensor:
    return LOSSES[section.feature_loss](comparable(form, output, target), target)


@contextlib.contextmanager
def _outputs(blocks: Sequence[tuple[nn.Module, Stack]]) -> Iterator[list[Streams]]:
    """Collect what blocks return, in their order."""
    seen: list[Streams] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output, stack=stack: seen.append(unpack(stack, output)))
        for block, stack in blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
