"""A segment's loss is Eq. 6, 11 and 12 as written, and least squares finds an affine replacement exactly."""

import copy

import pytest
import torch
from runs import DUAL, batches, runner
from torch import nn
from torch.nn import functional

from ppcl_toolkit.plan import Form
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.running.capture import Streams, joint_text, run_block
from ppcl_toolkit.running.schedule import Reading
from ppcl_toolkit.surgery.assemble import example_calls
from ppcl_toolkit.surgery.narrow import copy_weights, narrow
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.losses import LOSSES
from ppcl_toolkit.training.segment import LinearFit, Segment, block_inputs, comparable, text_of

PATH = DUAL.path
FORMS = {
    "ffn": Form(PATH, 1, 1, ffn=("image", "text")),
    "image ffn": Form(PATH, 1, 1, ffn=("image",)),
    "inside": Form(PATH, 1, 1, text="inside", reference=(0, 0)),
    "end": Form(PATH, 1, 1, text="end", reference=(0, 0)),
    "end ffn": Form(PATH, 1, 1, text="end", reference=(0, 0), ffn=("image",)),
}


class Recorder:
    def __init__(self, form):
        self.stack, self.first, self.last, self.reference = DUAL, form.first, form.last, form.reference
        self.readings = []

    def read(self, reading):
        self.readings.append(reading)

    def place(self, device):
        pass


def readings(run, form, count=3):
    recorder = Recorder(form)
    list(run.feed(batches()(0, count), [recorder]))
    return recorder.readings


def narrowed(run, form, source=None):
    """A narrow block with the weights of the teacher's, maps at zero; of a source, with its maps, too."""
    block = copy.deepcopy(run.transformer.transformer_blocks[form.first])
    narrow(block, DUAL, form, *example_calls(run.transformer, run.adapter, batches()[0])[PATH])
    copy_weights(source or run.transformer.transformer_blocks[form.first], block)
    return block


def fill(block, seed=0):
    """Give a block's linear maps values."""
    generator = torch.Generator().manual_seed(seed)
    for name, linear in block.named_children():
        if name.startswith("linear_"):
            for value in linear.parameters():
                nn.init.normal_(value, std=0.1, generator=generator)
    return block


def optimization(student):
    return Optimization("it", [student], Depth(steps=3, learning_rate=1e-30))


def segment(form, student, loss="direction"):
    return Segment(form, DUAL, student, optimization(student), LOSSES[loss])


def objective(one, reading):
    one.optimization = optimization(one.student)
    one.read(reading)
    return one.optimization.losses[0][1]


@pytest.mark.parametrize("name", FORMS)
def test_least_squares_recovers_an_affine_replacement(name):
    """The teacher's target is what a narrow block with known maps makes: the fit must find those maps."""
    form, run = FORMS[name], runner()
    known, wider = fill(narrowed(run, form)), run.transformer.transformer_blocks[1]
    if form.narrow_text and form.ffn:
        # Narrowed in two steps: the text's maps come from the wider form, only the FFN's are new.
        wider = fill(narrowed(run, form.previous), seed=1)
        copy_weights(wider, known)
    fresh = narrowed(run, form, wider)
    fit = LinearFit(form, DUAL, fresh, wider)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for reading in readings(run, form, 8):
            # Many different tokens: a few would leave the maps undetermined.
            streams = Streams(*(torch.randn(v.shape[0], v.shape[1], 32, generator=generator) for v in reading.inputs))
            packed = (
                None if reading.packed_text is None else torch.randn(reading.packed_text.shape, generator=generator)
            )
            moved = reading._replace(inputs=streams, packed_text=packed)
            output = run_block(known, DUAL, moved.arguments, block_inputs(form, moved))
            target = comparable(form, output, moved.target)
            fit.read(
                moved._replace(target=Streams(target.image, target.text if target.text is not None else streams.text))
            )
    missed = fit.solve(1e-12)
    for path, linear in known.named_children():
        if path == "linear_text_z" and not form.ffn:
            continue  # z is read from the wider block, see below
        if path.startswith("linear_"):
            assert torch.allclose(fresh.get_submodule(path).weight, linear.weight, atol=1e-3)
            assert torch.allclose(fresh.get_submodule(path).bias, linear.bias, atol=1e-3)
    if form.ffn:
        assert missed < 1e-8


@torch.no_grad()
def test_the_text_map_is_least_squares_from_the_references_z_to_the_blocks_own():
    form, run = FORMS["end"], runner()
    fresh, wider = narrowed(run, form), run.transformer.transformer_blocks[1]
    fit, found = LinearFit(form, DUAL, fresh, wider), readings(run, form, 30)
    for reading in found:
        fit.read(reading)
    fit.solve(1e-9)
    for path, x, y in [
        ("linear_text_z", [r.packed_text.chunk(2, 1)[1] for r in found], [text_of(wider, DUAL, r) for r in found]),
        ("linear_text_h", [r.packed_text.chunk(2, 1)[0] for r in found], [r.target.text for r in found]),
    ]:
        X, Y = torch.cat(x).flatten(0, 1).double(), torch.cat(y).flatten(0, 1).double()
        ones = torch.cat([X, torch.ones(len(X), 1)], dim=1)
        naive = torch.linalg.lstsq(ones, Y - X).solution
        linear = fresh.get_submodule(path)
        fitted = (Y - X - functional.linear(X, linear.weight.double(), linear.bias.double())).square().sum()
        assert fitted <= (Y - X - ones @ naive).square().sum() * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("name", ["direction", "relative_mse", "direction_magnitude"])
def test_the_depth_loss_compares_the_students_output_with_the_runs_last(name):
    form, run = Form(PATH, 1, 3), runner()
    student = copy.deepcopy(run.transformer.transformer_blocks[1]).requires_grad_(True)
    for reading in readings(run, form):
        with torch.no_grad():
            s = run_block(student, DUAL, reading.arguments, reading.inputs)
        assert objective(segment(form, student, name), reading) == pytest.approx(float(LOSSES[name](s, reading.target)))
        naive = sum(
            ((a / a.norm(dim=-1, keepdim=True) - b / b.norm(dim=-1, keepdim=True)) ** 2).sum(-1).mean()
            for a, b in zip(s, reading.target, strict=True)
        )
        assert name != "direction" or objective(segment(form, student), reading) == pytest.approx(
            float(naive), rel=1e-5
        )


def directions(s, t):
    return ((s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)) ** 2).sum(-1).mean()


def share(s, t):
    return sum(float((a - b).norm() ** 2 / b.norm() ** 2) for a, b in zip(s, t, strict=True)) / len(s)


@pytest.mark.parametrize("name", FORMS)
def test_the_width_loss_is_equation_11_plus_equation_12(name):
    form, run = FORMS[name], runner()
    teacher = run.transformer.transformer_blocks[1]
    wider = narrowed(run, form.previous) if not form.previous.is_teacher else teacher
    student = fill(narrowed(run, form, wider)).requires_grad_(True)
    one = segment(form, student)
    one.wider, one.alignment = wider, 0.5
    for reading in readings(run, form):
        with torch.no_grad():
            given = reading.inputs
            if form.narrow_text:
                given = Streams(reading.inputs.image, reading.packed_text)
            with joint_text(student, DUAL) as entered:
                output = run_block(student, DUAL, reading.arguments, given)
            with joint_text(teacher, DUAL) as z:
                run_block(teacher, DUAL, reading.arguments, reading.inputs)
            target = reading.target
            eq11 = directions(output.image, target.image)
            if form.text != "inside":
                eq11 = eq11 + directions(output.text, target.text)
            eq12 = 0.0
            if "image" in form.ffn:
                eq12 += share(output.image, target.image)
            if "text" in form.ffn or form.text == "end":
                eq12 += share(output.text, target.text)
            if form.narrow_text and not form.ffn:
                eq12 += share(entered[0], z[0])
        assert objective(one, reading) == pytest.approx(float(eq11 + 0.5 * eq12), rel=1e-4)


def test_a_narrow_text_stream_is_given_what_its_reference_packed():
    streams, packed = Streams(torch.ones(1, 4, 2), torch.ones(1, 3, 2)), torch.zeros(1, 6, 2)
    reading = Reading({}, streams, streams, packed)
    assert block_inputs(Form(PATH, 0, 2), reading) is streams
    assert block_inputs(FORMS["inside"], reading).text is packed
    assert block_inputs(FORMS["end"], reading).image is streams.image


def test_only_what_the_teacher_also_has_is_compared():
    image, text = torch.ones(1, 4, 2), torch.ones(1, 3, 2)
    packed, target = Streams(image, torch.cat([text, text * 2], dim=1)), Streams(image, text)
    assert comparable(FORMS["inside"], packed, target).text is None
    assert torch.equal(comparable(Form(PATH, 0, 0, text="tap"), packed, target).text, text)
    assert torch.equal(comparable(FORMS["end"], target, target).text, text)
    assert comparable(Form(PATH, 0, 2), Streams(image), target).text is None
    assert comparable(Form(PATH, 0, 2), target, Streams(image)).text is None


def test_a_stopped_segment_reads_no_more():
    form, run = Form(PATH, 1, 3), runner()
    one = segment(form, copy.deepcopy(run.transformer.transformer_blocks[1]).requires_grad_(True))
    one.optimization.stop("enough")
    one.read(readings(run, form)[0])
    assert one.optimization.losses == []


def test_a_response_has_the_teachers_type():
    form, run = Form(PATH, 1, 3), runner()
    student = copy.deepcopy(run.transformer.transformer_blocks[1]).requires_grad_(True)
    reading = readings(run, form)[0]
    inputs = Streams(*(value.bfloat16() for value in reading.inputs))
    output = segment(form, student).respond(reading._replace(inputs=inputs))
    assert output.image.dtype == output.text.dtype == torch.bfloat16
    assert not output.image.requires_grad
