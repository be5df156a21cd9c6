"""Where tensors live: what is brought to a device comes home to the memory that it left."""

import torch
from runs import FLUX, batches, equal, plan_of, runner

from ppcl_toolkit.plan import Interval
from ppcl_toolkit.running.placement import moved
from ppcl_toolkit.surgery.assemble import example_calls, student_of

META = torch.device("meta")


def addresses(module):
    return [tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]]


def test_what_stands_in_several_places_is_moved_once():
    shared = torch.ones(3)
    first, (second, number) = moved([shared, (shared, 5)], META)
    assert first is second
    assert (first.device.type, number) == ("meta", 5)


def test_examples_of_calls_are_shapes_wherever_the_transformer_is():
    teacher = runner()
    calls = example_calls(teacher.transformer, FLUX, batches()[0])
    teacher.transformer.to(META)
    again = example_calls(teacher.transformer, FLUX, batches()[0])
    for path, (_, streams) in calls.items():
        assert {stream.device.type for stream in (*streams, *again[path][1])} == {"meta"}
        assert [stream.shape for stream in streams] == [stream.shape for stream in again[path][1]]


def test_a_student_shares_what_is_the_teachers_and_learns_apart_from_it():
    teacher = runner()
    plan = plan_of(teacher, Interval(stack="transformer_blocks", first=1, last=2))
    trained = {
        "transformer_blocks.1-2": {n: v + 1 for n, v in runner().transformer.transformer_blocks[1].state_dict().items()}
    }
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}
    student = student_of(teacher.transformer, FLUX, plan, trained, batches()[0])
    known = set(addresses(teacher.transformer))
    own = [name for name, value in student.named_parameters() if value.data_ptr() not in known]
    assert {name.split(".")[1] for name in own} == {"1"}
    assert equal(student.transformer_blocks[1].state_dict(), trained["transformer_blocks.1-2"])
    student.to(torch.float64)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert equal(before, teacher.transformer.state_dict())
