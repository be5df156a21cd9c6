"""Costs of students: against torch's own counter over whole students that are run, with weights, on the CPU."""

import pytest
import tiny
import torch
from runs import DUAL, SINGLE, batches, plan_of, runner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.running.flops import counting
from ppcl_toolkit.surgery.assemble import reshape
from ppcl_toolkit.surgery.costs import Costs

PAIR = Interval(stack=DUAL.path, first=0, last=1)
TAIL = Interval(stack=SINGLE.path, first=0, last=2)
TEXT = TextRun(stack=DUAL.path, reference=0, last=3)
SWAP = FfnSwap(stack=DUAL.path, block=2, streams=("image",))
LOW = tuple(ModulationSwap(stack=stack.path, rank=4) for stack in (DUAL, SINGLE))
PLANS = [(), (PAIR,), (PAIR, TAIL), (TEXT,), (TEXT, SWAP), (PAIR, TEXT, SWAP), (TAIL, *LOW), (PAIR, TEXT, SWAP, *LOW)]


def counted(transformer, kwargs):
    """Run a transformer and count; attention as the two products that it is: torch has no formula for a CPU's."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(**kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("operations", PLANS, ids=lambda plan: ", ".join(map(str, plan)) or "teacher")
def test_flops_and_parameters_are_those_of_the_whole_student(operations):
    run = runner()
    plan = plan_of(run, *operations)
    found = Costs(run.transformer, run.adapter, batches(size=3)[0], torch.bfloat16)(plan)
    student, call = runner().transformer, tiny.flux_inputs(batch=1, image_tokens=9, text_tokens=5)
    reshape(student, run.adapter, plan, call)
    assert found.flops == counted(student, call)
    assert found.params == sum(p.numel() for p in student.parameters())
    assert found.bytes == sum(p.numel() * p.element_size() for p in student.to(torch.bfloat16).parameters())


def test_matrices_by_hand():
    """Width 32, 5 + 9 tokens: two operations a weight and token, and two products of attention."""
    run = runner(dual=1, single=1)
    costs = Costs(run.transformer, run.adapter, batches()[0], torch.float32)
    dual, single = (costs.form(form).flops for form in plan_of(run).forms())
    text, image, d = 5, 9, 32
    per_token = 2 * d * d * (3 + 1 + 8)
    attention = 2 * 2 * (text + image) ** 2 * d
    assert dual == per_token * (text + image) + attention + 2 * 2 * 6 * d * d  # modulation, once a picture
    assert single == per_token * (text + image) + attention + 2 * 3 * d * d


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_other_families(family):
    adapter = load_adapter(family)
    make, inputs = (
        (tiny.sd3_transformer, tiny.sd3_inputs)
        if family == "sd3"
        else (tiny.qwen_image_transformer, tiny.qwen_image_inputs)
    )
    path, call = adapter.stacks[0].path, inputs()
    pictures = len(call["hidden_states"])
    costs = Costs(make(), adapter, call, torch.float32)
    for operations in [
        (),
        (Interval(stack=path, first=1, last=2),),
        (Interval(stack=path, first=2, last=3),),
        (TextRun(stack=path, reference=0, last=2), FfnSwap(stack=path, block=3, streams=("image",))),
    ]:
        plan = Plan(family=family, depths={path: 4}, operations=operations)
        student = make()
        reshape(student, adapter, plan, call)
        found = costs(plan)
        assert found.params == sum(p.numel() for p in student.parameters()), operations
        assert found.flops * pictures == counted(student, call), operations


def test_a_student_can_be_counted_as_a_teacher():
    """Its blocks are given other streams than a stock transformer's: a text run's come with the reference's z."""
    run = runner()
    first = plan_of(run, TEXT)
    reshape(run.transformer, run.adapter, first, batches()[0])
    found = Costs(run.transformer, run.adapter, batches()[0], torch.float32)
    stock = Costs(runner().transformer, run.adapter, batches()[0], torch.float32)
    assert found(plan_of(run)) == stock(first)
    assert found(plan_of(run, TAIL)) == stock(first.with_operations([*first.operations, TAIL]))


def test_counting_leaves_the_teacher_as_it_was():
    run = runner()
    before = run.velocity(batches()[0])
    Costs(run.transformer, run.adapter, batches()[0], torch.float32)(plan_of(run, PAIR, TEXT, *LOW))
    assert torch.equal(run.velocity(batches()[0]), before)
    assert not any("forward" in vars(module) for module in run.transformer.modules())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_is_counted(masked):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.ones(5, 7, dtype=torch.bool) if masked else None
    with counting() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert counter.get_total_flops() == 2 * 3 * (2 * 5 * 7 * 8) * 2
