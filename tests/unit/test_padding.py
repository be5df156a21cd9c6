"""Texts of several lengths in one batch: all is as if each sample had gone alone, unpadded, through the stock model."""

import dataclasses

import pytest
import torch
from families import QWEN_IMAGE
from runs import FLUX, desk, sample
from tiny import qwen_image_transformer

from ppcl_toolkit.plan import Form, Interval, Plan
from ppcl_toolkit.recipe import Depth, Finetune, Intervals
from ppcl_toolkit.running.capture import run_block
from ppcl_toolkit.running.noise import Batches, Sample, padded, share_of_negatives
from ppcl_toolkit.running.passage import Reading
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.depth import _BestBlock
from ppcl_toolkit.stages.finetune import _loss
from ppcl_toolkit.stages.intervals import find_intervals
from ppcl_toolkit.stages.probe import ProbeReader
from ppcl_toolkit.stages.width import narrow_block, wider_block
from ppcl_toolkit.surgery.assemble import example_calls
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.losses import LOSSES
from ppcl_toolkit.training.segment import LinearFit, Segment, block_inputs
from ppcl_toolkit.training.substitution import _Affine
from ppcl_toolkit.training.targets import answer

(STACK,) = QWEN_IMAGE.stacks
MASK = "encoder_hidden_states_mask"


def qwen_sample(seed, tokens, *, negative=False, padding=0):
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens + padding, 32, generator=g)
    mask = None if padding == 0 else torch.tensor([[1] * tokens + [0] * padding])
    arguments = {"encoder_hidden_states": text, MASK: mask, "img_shapes": [[(1, 3, 3)]], "guidance": None}
    return Sample(latents=torch.randn(1, 9, 4, generator=g), arguments=arguments, negative=negative)


SAMPLES = [qwen_sample(i, tokens) for i, tokens in enumerate((5, 3, 7, 4))]
SAMPLES += [qwen_sample(4, 6, padding=3), *(qwen_sample(9 + i, 2, negative=True) for i in range(5))]


def noised(size=4, samples=SAMPLES, **options):
    return Batches(samples=samples, adapter=QWEN_IMAGE, size=size, seed=3, **options)


def alone(batch):
    """Every sample of a batch as a call of its own, without padding."""
    calls = []
    for row in range(len(batch["hidden_states"])):
        call = {n: v[row : row + 1] if isinstance(v, torch.Tensor | list) else v for n, v in batch.items()}
        if call[MASK] is not None:
            own = call.pop(MASK).bool()[0]
            call |= {"encoder_hidden_states": call["encoder_hidden_states"][:, own], MASK: None}
        calls.append(call)
    return calls


@pytest.fixture(scope="module")
def teacher():
    return Runner(qwen_image_transformer().requires_grad_(False), QWEN_IMAGE)


@pytest.fixture(scope="module")
def mixed():
    batch = noised()[1]
    assert batch[MASK].dtype == torch.bool
    lengths = batch[MASK].sum(1).tolist()
    assert len(set(lengths)) > 1 and max(lengths) == batch["encoder_hidden_states"].shape[1]
    return batch


class Recorder:
    def __init__(self, form):
        self.stack, self.first, self.last, self.reference = STACK, form.first, form.last, form.reference
        self.seen: list[Reading] = []

    def read(self, reading):
        self.seen.append(reading)

    def place(self, device):
        pass


def readings(teacher, form, batches):
    recorder = Recorder(form)
    list(teacher.feed(batches, [recorder]))
    return recorder.seen


@torch.no_grad()
def test_a_sample_of_a_mixed_batch_is_what_the_stock_model_makes_of_it_alone(teacher):
    stock = qwen_image_transformer()
    for batch in noised()(0, 4):
        for velocity, call in zip(teacher.velocity(batch), alone(batch), strict=True):
            assert call["encoder_hidden_states"].abs().sum(-1).all(), "no padding is left"
            torch.testing.assert_close(velocity, stock(**call)[0][0], atol=1e-5, rtol=1e-4)


def test_texts_come_as_they_were_recorded_and_no_longer_than_the_longest():
    for batch in noised()(0, 6):
        for call in alone(batch):
            own = [s.arguments["encoder_hidden_states"][0] for s in SAMPLES]
            own = [text[:6] if len(text) == 9 else text for text in own]
            assert any(
                t.shape == call["encoder_hidden_states"][0].shape and torch.equal(t, call["encoder_hidden_states"][0])
                for t in own
            )
    same = [qwen_sample(i, 5) for i in range(3)]
    assert noised(samples=same)[0][MASK] is None
    # Recorded with padding that nobody in the batch needs.
    (call,) = padded([SAMPLES[4].arguments], *QWEN_IMAGE.padded)
    assert call[MASK] is None and call["encoder_hidden_states"].shape[1] == 6


def test_samples_that_differ_in_more_than_their_text_share_no_batch():
    large = dataclasses.replace(SAMPLES[0], latents=torch.zeros(1, 16, 4))
    drawn = noised(samples=[*SAMPLES, large])
    for batch in drawn(0, 30):
        rows = batch["hidden_states"]
        assert rows.shape[1] in (9, 16)


@pytest.mark.parametrize("block", [0, 2])
def test_sums_of_probes_are_those_of_single_samples(teacher, mixed, block):
    one, other = ProbeReader(STACK, block), ProbeReader(STACK, block)
    list(teacher.feed([mixed], [one]))
    list(teacher.feed(alone(mixed), [other]))
    for name, total in other.state().items():
        torch.testing.assert_close(one.state()[name], total, rtol=1e-4, atol=1e-4)
    assert one.state()["text.count"] == mixed[MASK].sum()


def test_curves_are_those_of_single_samples(teacher, mixed, tmp_path):
    g = torch.Generator().manual_seed(3)
    weights = {(STACK.path, b, s): 0.2 * torch.randn(32, 32, generator=g) for b in range(4) for s in STACK.streams}

    def curves(batches):
        settings = Intervals(batches=len(batches))
        return find_intervals(
            teacher, lambda start, stop: batches[start:stop], settings, weights, desk(tmp_path / str(len(batches)))
        ).curves

    one, other = (curves(batches)[STACK.path] for batches in ([mixed], alone(mixed)))
    for stream in one:
        for found, expected in zip(one[stream], other[stream], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


FORMS = {
    "depth": Form(STACK.path, 0, 1),
    "ffn": Form(STACK.path, 1, 1, ffn=("image", "text")),
    "inside": Form(STACK.path, 1, 1, text="inside", reference=(0, 0)),
    "end": Form(STACK.path, 1, 1, text="end", reference=(0, 0)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", FORMS)
def test_the_loss_is_the_mean_of_single_samples(teacher, mixed, name, loss):
    form, example = FORMS[name], example_calls(teacher.transformer, QWEN_IMAGE, mixed)
    block = (
        narrow_block(teacher, form, {}, example)
        if not form.is_stock
        else qwen_image_transformer(1).transformer_blocks[0]
    )
    for parameter in block.parameters():  # maps at zero have no error to speak of
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))

    def value(reading):
        optimization = Optimization("it", [block], Depth(steps=3))
        segment = Segment(form, STACK, block, optimization, LOSSES[loss])
        if form.narrow_text:
            segment.wider = wider_block(teacher, form, {}, example).requires_grad_(False)
        segment.alignment = 0.0 if form.is_stock else 0.7
        return segment._objective(reading).item()

    (whole,), parts = readings(teacher, form, [mixed]), readings(teacher, form, alone(mixed))
    expected = sum(value(part) for part in parts) / len(parts)
    assert value(whole) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["ffn", "end", "inside"])
def test_least_squares_count_every_token_once(teacher, mixed, name):
    form, example = FORMS[name], example_calls(teacher.transformer, QWEN_IMAGE, mixed)
    fits = []
    for batches in ([mixed], alone(mixed)):
        block = narrow_block(teacher, form, {}, example)
        fits.append(LinearFit(form, STACK, block, wider_block(teacher, form, {}, example)))
        list(teacher.feed(batches, [fits[-1]]))
    one, other = fits
    assert one._moments.keys() == other._moments.keys() and one._moments
    for key, moments in one._moments.items():
        for total, expected in zip(moments.tensors().values(), other._moments[key].tensors().values(), strict=True):
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
        assert one.energy[key] == pytest.approx(other.energy[key], rel=1e-4)


def test_best_blocks_and_substitutes_count_every_token_once(teacher, mixed):
    blocks = list(teacher.blocks(STACK.path))
    interval = Interval(stack=STACK.path, first=0, last=2)
    found = []
    for batches in ([mixed], alone(mixed)):
        best = _BestBlock(Form(STACK.path, 0, 2), STACK, blocks[:3])
        affine = _Affine(STACK, interval, blocks[0])
        list(teacher.feed(batches, [best, affine]))
        found.append([*best._moments, affine._moments])
    for one, other in zip(*found, strict=True):
        for stream, moments in one.items():
            for total, expected in zip(moments.tensors().values(), other[stream].tensors().values(), strict=True):
                torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_feature_terms_are_the_mean_of_single_samples(teacher, mixed, loss):
    interval = Interval(stack=STACK.path, first=0, last=2)
    plan = Plan(family="qwen_image", depths={STACK.path: 4}).with_operations([interval])
    student = qwen_image_transformer(2)  # blocks 0 and 1 stand where 0 and 3 would

    class Given(list):
        dtype = torch.float32

    def value_of(batch):
        target = answer(teacher, Given([batch]), 0, [Form(STACK.path, 0, 2)])
        return _loss(teacher, student, plan, batch, target, Finetune(features=0.5, feature_loss=loss)).item()

    singles = [value_of(call) for call in alone(mixed)]
    assert value_of(mixed) == pytest.approx(sum(singles) / len(singles), rel=1e-4)


def negatives(drawn, count):
    """Of so many batches, the share of negatives in each: their text has two tokens."""
    return [
        sum(call["encoder_hidden_states"].shape[1] == 2 for call in alone(drawn[n])) / drawn.size for n in range(count)
    ]


def test_every_batch_has_its_share_of_negatives():
    assert negatives(noised(size=2), 20) == [0.5] * 20
    assert negatives(noised(size=4, negatives=0.25), 20) == [0.25] * 20
    assert negatives(noised(size=4, negatives=0.0), 20) == [0.0] * 20
    shares = negatives(noised(size=2, negatives=0.36), 50)
    assert sum(shares) / 50 == pytest.approx(0.36)
    # Where they are all that there is, they are taken, and so are the others.
    assert negatives(noised(samples=[s for s in SAMPLES if s.negative], negatives=0.25), 3) == [1.0] * 3
    assert negatives(noised(samples=[s for s in SAMPLES if not s.negative], negatives=0.25), 3) == [0.0] * 3


def test_where_nothing_can_be_masked_negatives_take_turns_batch_by_batch():
    samples = [
        *(sample(i) for i in range(6)),
        *(dataclasses.replace(sample(i, text_tokens=3), negative=True) for i in range(6)),
    ]
    drawn = Batches(samples=samples, adapter=FLUX, size=2, seed=0, negatives=0.25)
    lengths = [batch["encoder_hidden_states"].shape[1] for batch in drawn(0, 40)]
    assert lengths.count(3) == 10
    assert [n for n, tokens in enumerate(lengths) if tokens == 3] == list(range(3, 40, 4))


def test_an_error_of_a_negative_counts_as_much_as_guidance_lets_it():
    assert share_of_negatives(None) == 0.5
    assert share_of_negatives(1.0) == share_of_negatives(0.0) == 0.0
    assert share_of_negatives(4.0) == pytest.approx(9 / 25)
    assert share_of_negatives(1e6) == pytest.approx(0.5, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ffn", "end", "inside"])
def test_a_block_narrowed_without_a_mask_takes_one(teacher, mixed, name):
    outputs = []
    for example in (mixed, alone(mixed)[0]):
        calls = example_calls(teacher.transformer, QWEN_IMAGE, example)
        block = narrow_block(teacher, FORMS[name], {}, calls)
        for number, parameter in enumerate(block.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        (reading,) = readings(teacher, FORMS[name], [mixed])
        outputs.append(run_block(block, STACK, reading.arguments, block_inputs(FORMS[name], reading)).image)
    assert torch.equal(*outputs)
