"""The two schedules give every reader the same readings, and the readings are the teacher's own."""

import pytest
import tiny
import torch
from families import TRANSFORMERS

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.running.capture import Streams, run_block
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner

FLUX = load_adapter("flux")
DUAL, SINGLE = FLUX.stacks


class Recorder:
    """Keeps what it reads; as a follower it answers with its target plus one."""

    def __init__(self, stack, first, last, reference=None):
        self.stack, self.first, self.last, self.reference = stack, first, last, reference
        self.seen = []

    def read(self, reading):
        self.seen.append(reading)

    def place(self, device):
        pass

    def respond(self, reading):
        return Streams(reading.target.image + 1, reading.target.text)


def readings(schedule, spans, *, follow=False):
    transformer = tiny.flux_transformer()
    recorders = [Recorder(*span) for span in spans]
    batches = [tiny.flux_inputs(seed=seed) for seed in range(5)]
    counts = list(Runner(transformer, FLUX, schedule).feed(batches, recorders, follow=follow))
    assert counts[-1] == 5
    return transformer, recorders


SPANS = [(DUAL, 0, 0), (DUAL, 1, 2), (DUAL, 3, 3, (1, 2)), (SINGLE, 0, 1), (SINGLE, 2, 2)]


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_streamed_equals_resident_bit_by_bit(chunk):
    _, resident = readings(Placement(), SPANS)
    _, streamed = readings(Placement(streamed=True, chunk=chunk), SPANS)
    for one, other in zip(resident, streamed, strict=True):
        for a, b in zip(one.seen, other.seen, strict=True):
            assert torch.equal(a.inputs.image, b.inputs.image)
            assert torch.equal(a.target.image, b.target.image)
            assert a.target.text is b.target.text is None or torch.equal(a.target.text, b.target.text)
            assert a.packed_text is b.packed_text is None or torch.equal(a.packed_text, b.packed_text)


@torch.no_grad()
def test_a_reading_is_what_the_teacher_computed():
    transformer, (pair,) = readings(Placement(), [(DUAL, 1, 2)])
    seen = {}
    for index, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output}))
    for seed, reading in enumerate(pair.seen):
        transformer(**tiny.flux_inputs(seed=seed))
        assert torch.equal(reading.inputs.image, seen[0][1])
        assert torch.equal(reading.target.text, seen[2][0])
        middle = run_block(transformer.transformer_blocks[1], DUAL, reading.arguments, reading.inputs)
        assert torch.equal(middle.image, seen[1][1])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_text_that_nobody_reads_is_no_target(family, streamed):
    transformer, adapter, batch = TRANSFORMERS[family]()
    depths = adapter.depths(transformer)
    recorders = [Recorder(stack, block, block) for stack in adapter.stacks for block in range(depths[stack.path])]
    list(Runner(transformer, adapter, Placement(streamed=streamed)).feed([batch] * 2, recorders))
    for recorder in recorders[:-1]:
        assert all(reading.target.text is not None for reading in recorder.seen)
    assert all(reading.target.text is None for reading in recorders[-1].seen)
    assert all(reading.inputs.text is not None for reading in recorders[-1].seen)


def test_only_what_is_needed_runs():
    transformer = tiny.flux_transformer()
    ran = []
    for index, block in enumerate(transformer.transformer_blocks):
        block.attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    for block in transformer.single_transformer_blocks:
        block.attn.register_forward_hook(lambda *_: ran.append("single"))
    list(Runner(transformer, FLUX).feed([tiny.flux_inputs()], [Recorder(DUAL, 0, 1)]))
    assert ran == [0, 1]


@torch.no_grad()
def test_followers_feed_each_other():
    _, (first, second, third) = readings(Placement(), [(DUAL, 0, 1), (DUAL, 2, 3), (SINGLE, 1, 2)], follow=True)
    for a, b, c in zip(first.seen, second.seen, third.seen, strict=True):
        # The next student starts where the last one ended; the target stays the teacher's.
        assert torch.equal(b.inputs.image, a.target.image + 1)
        assert not torch.equal(c.inputs.image, c.target.image)
    _, (_, teacher, _) = readings(Placement(), [(DUAL, 0, 1), (DUAL, 2, 3), (SINGLE, 1, 2)])
    assert torch.equal(teacher.seen[0].target.image, second.seen[0].target.image)
    assert not torch.equal(teacher.seen[0].inputs.image, second.seen[0].inputs.image)


def test_a_streamed_teacher_predicts_the_same():
    transformer = tiny.flux_transformer()
    batch = tiny.flux_inputs()
    assert torch.equal(
        Runner(transformer, FLUX).velocity(batch), Runner(transformer, FLUX, Placement(streamed=True)).velocity(batch)
    )
