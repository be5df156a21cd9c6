"""Stage `width`: text streams and FFNs become linear maps (Eq. 8-12, Algorithm 1 lines 24-31).

Every narrow block starts from its wider form with maps set by least squares, and then learns as a segment of its own.

    width: {steps: 2000, batch: 2, loss: direction, alignment: 1.0, text_blocks: 6, ffn_blocks: 3}
"""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.plan import Form, Plan, trained_forms
from ppcl_toolkit.recipe import Width
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import example_calls, standing_in
from ppcl_toolkit.surgery.narrow import copy_weights, narrow
from ppcl_toolkit.training.distill import finish, shared_out, train_segments
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.losses import LOSSES
from ppcl_toolkit.training.segment import LinearFit, Segment
from ppcl_toolkit.training.shelf import Shelf


def distill_width(
    runner: Runner, plans: Sequence[Plan], bank: Bank, batches: Batches, section: Width, desk: Desk
) -> list[str]:
    """Train the narrow blocks of `plans` and bank them; return the segments that stopped early, and why."""
    forms = [form for form in trained_forms(plans) if not form.is_stock]
    stopped = []
    # A block that loses its text and its FFN learns the first before the second: that form is in the bank, too.
    for wave in ([f for f in forms if not (f.narrow_text and f.ffn)], [f for f in forms if f.narrow_text and f.ffn]):
        known = bank.joined(desk.folder)
        processes.wait()  # nobody banks before all have looked
        if any(form.key not in known for form in wave):
            # In a function of its own: when it returns, nothing of a wave is kept.
            stopped += _train(runner, wave, known, batches, section, desk)
    finish(desk.folder, [form.key for form in forms])
    return stopped


def _train(runner: Runner, wave: Sequence[Form], bank: Bank, batches: Batches, section: Width, desk: Desk) -> list[str]:
    sliced, own = shared_out(runner, wave, batches, section)
    segments = _segments(sliced, own, bank, batches, section, Shelf(desk.folder, runner.placement.waiting))
    return train_segments(sliced, segments, batches, section, desk, keys=[form.key for form in wave])


def narrow_block(runner: Runner, form: Form, bank: Mapping[str, dict[str, Tensor]], example: Mapping) -> nn.Module:
    """Return a block of `form` in fp32, with the weights of its wider form and new linear maps at zero."""
    arguments, streams = example[form.stack]
    stack = runner.adapter.stack(form.stack)
    block = _stock_block(runner, form)
    narrow(block, stack, form, arguments, streams)
    copy_weights(wider_block(runner, form, bank, example), block.float())
    return block


def wider_block(runner: Runner, form: Form, bank: Mapping[str, dict[str, Tensor]], example: Mapping) -> nn.Module:
    """Return the block, in fp32, that `form` is narrowed from: the teacher's own, or the bank's."""
    wider = form.previous
    assert wider is not None
    block = _stock_block(runner, wider)
    if not wider.is_teacher:
        narrow(block, runner.adapter.stack(form.stack), wider, *example[form.stack])
        block.float().load_state_dict(bank[wider.key], strict=True)
    return block.float()


def _stock_block(runner: Runner, form: Form) -> nn.Module:
    block = copy.deepcopy(runner.blocks(form.stack)[form.first])
    return standing_in(runner.transformer, runner.adapter, form, block)


def _segments(
    runner: Runner, forms: Sequence[Form], bank: Bank, batches: Batches, section: Width, shelf: Shelf
) -> list[Segment]:
    example = example_calls(runner.transformer, runner.adapter, batches[0])
    students = [narrow_block(runner, form, bank, example) for form in forms]
    # Whose z is aligned with that of the block that it was: nothing else of that block is needed, and it never learns.
    dtype = batches.dtype
    wider = [
        wider_block(runner, f, bank, example).to(dtype).requires_grad_(False) if f.narrow_text and not f.ffn else None
        for f in forms
    ]
    stacks = [runner.adapter.stack(form.stack) for form in forms]
    fits = [LinearFit(*each) for each in zip(forms, stacks, students, wider, strict=True)]
    for _ in runner.feed(batches(0, section.batches), fits):
        pass
    segments = []
    for form, fit, stack, student, origin in zip(forms, fits, stacks, students, wider, strict=True):
        fit.solve(section.ridge)
        student.requires_grad_(True)
        optimization = Optimization(
            form.key, [student], section, exchange=section.split == "samples", device=runner.placement.device
        )
        segment = Segment(form, stack, student, optimization, LOSSES[section.loss])
        segment.wider, segment.alignment = origin, section.alignment
        if runner.placement.streamed:
            segment.wait_on(shelf)
        segments.append(segment)
    return segments
