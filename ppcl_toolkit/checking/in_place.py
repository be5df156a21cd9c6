"""A student's blocks where they learned: at their places in the teacher, whose forward runs around them."""

from typing import Any, final

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.running.capture import answer, passing
from ppcl_toolkit.running.passage import Batch
from ppcl_toolkit.running.placement import computing_on, moved
from ppcl_toolkit.surgery.assemble import student_blocks
from ppcl_toolkit.surgery.copies import sharing_copy


@torch.no_grad()
def called_in_place(
    teacher: nn.Module, adapter: Adapter, plan: Plan, student: nn.Module, call: Batch, device: torch.device
) -> Tensor:
    """Return what a teacher returns, [B, ...], in which each block of the student of `plan` is called at its place.

    That is the first place of what the block stands for; blocks at the others hand on what they are given. Numbers of
    blocks are the teacher's, as when the student learned; what is around them has the student's weights.
    """
    whole = sharing_copy(teacher)
    for block, form in student_blocks(student, adapter, plan):
        stack = adapter.stack(form.stack)
        blocks = stack.blocks(whole)
        blocks[form.first] = block
        for index in range(form.first + 1, form.last + 1):
            blocks[index] = _Passed(blocks[index], stack)
    own = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    inside = tuple(f"{stack.path}." for stack in adapter.stacks)
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        if name.startswith(inside) or name in adapter.tables:
            continue
        if name in own and own[name].shape == tensor.shape:
            tensor.data = own[name].data
    with computing_on(whole, device):
        return answer(whole, moved(dict(call), device)).cpu()


@final
class _Passed(nn.Module):
    """Takes the place of a block, and hands on the streams that it is given; what code reads of the block is there."""

    def __init__(self, block: nn.Module, stack: Stack) -> None:
        super().__init__()
        vars(self)["_block"] = block  # no part of this: its weights stay where they are
        self.forward = passing(block, stack)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"], name)
