"""Students made of whole transformers: no bit changes without a plan, and every plan gives what its blocks give."""

import copy
import dataclasses

import pytest
import torch
import videos
from diffusers import FluxTransformer2DModel
from families import SD3, TRANSFORMERS
from tiny import flux_inputs, flux_transformer, randomize, sd3_inputs, sd3_transformer
from torch._dynamo.testing import CompileCounterWithBackend

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Form, Interval, Plan, TextRun
from ppcl_toolkit.running.capture import stack_calls
from ppcl_toolkit.surgery.assemble import (
    count_parameters,
    drop_blocks,
    load_bank,
    reshape,
    standing_in,
    student_blocks,
)
from ppcl_toolkit.surgery.copies import meta_copy

STACK = "transformer_blocks"
OPERATIONS = (
    Interval(stack=STACK, first=0, last=1),
    Interval(stack="single_transformer_blocks", first=1, last=2),
    TextRun(stack=STACK, reference=2, last=4),
    FfnSwap(stack=STACK, block=2, streams=("image", "text")),
    FfnSwap(stack=STACK, block=4, streams=("image",)),
)


@pytest.fixture
def flux():
    return flux_transformer(6, 3), load_adapter("flux"), flux_inputs()


def plan_for(transformer, adapter, *operations):
    return Plan(family=adapter.family, depths=adapter.depths(transformer), operations=operations)


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def run(transformer, kwargs):
    return transformer(**kwargs)[0]


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_empty_plan_changes_no_bit(family):
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    before, config, expected = (
        copy.deepcopy(transformer.state_dict()),
        dict(transformer.config),
        run(transformer, kwargs),
    )
    blocks = list(transformer.transformer_blocks)
    reshape(transformer, adapter, plan_for(transformer, adapter), kwargs)
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
    assert dict(transformer.config) == config
    assert all(one is other for one, other in zip(blocks, transformer.transformer_blocks, strict=True))
    assert torch.equal(run(transformer, kwargs), expected)


def test_depth_only_student_is_the_stock_model_of_its_config(flux):
    transformer, adapter, kwargs = flux
    student = copy.deepcopy(transformer)
    reshape(student, adapter, plan_for(transformer, adapter, *OPERATIONS[:2]), kwargs)
    assert (student.config["num_layers"], student.config["num_single_layers"]) == (5, 2)
    stock = type(transformer).from_config(student.config).eval()
    stock.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(run(stock, kwargs), run(student, kwargs))
    kept = [0, 2, 3, 4, 5]
    for index, block in zip(kept, student.transformer_blocks, strict=True):
        for name, value in block.state_dict().items():
            assert torch.equal(value, transformer.transformer_blocks[index].state_dict()[name])


def test_default_depth_in_the_config_is_replaced():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 8))
    adapter = load_adapter("flux")
    drop_blocks(transformer, adapter, plan_for(transformer, adapter, Interval(stack=STACK, first=4, last=9)))
    assert len(type(transformer).from_config(transformer.config).transformer_blocks) == 14


def test_student_runs_and_counts(flux):
    transformer, adapter, kwargs = flux
    plan = plan_for(transformer, adapter, *OPERATIONS)
    expected = count_parameters(transformer, adapter, plan, kwargs)
    student, weightless = copy.deepcopy(transformer), meta_copy(transformer)
    reshape(student, adapter, plan, kwargs)
    assert size(student) == expected < size(transformer)
    assert run(student, kwargs).shape == run(transformer, kwargs).shape
    on_meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    reshape(weightless, adapter, plan, on_meta)
    assert {n: v.shape for n, v in weightless.state_dict().items()} == {
        n: v.shape for n, v in student.state_dict().items()
    }
    with pytest.raises(PpclError, match="save_variant"):
        student.save_pretrained("never-written")


def test_gradient_checkpointing_gives_the_same_gradients(flux):
    transformer, adapter, kwargs = flux
    reshape(transformer, adapter, plan_for(transformer, adapter, *OPERATIONS), kwargs)
    randomize(transformer).train()

    def gradients():
        transformer.zero_grad()
        transformer(**kwargs)[0].square().sum().backward()
        return {name: parameter.grad for name, parameter in transformer.named_parameters()}

    plain = gradients()
    transformer.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert all(torch.equal(value, checkpointed[name]) for name, value in plain.items())
    assert all(value is not None and value.any() for value in plain.values())


def test_narrow_blocks_compile_once_per_form(flux):
    transformer, adapter, kwargs = flux
    plan = plan_for(transformer, adapter, TextRun(stack=STACK, reference=0, last=5))
    reshape(transformer, adapter, plan, kwargs)
    expected = run(transformer, kwargs)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in transformer.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    assert torch.allclose(run(transformer, kwargs), expected, atol=1e-6)
    assert counter.frame_count == 3  # tap, inside, end


def test_bank_is_loaded_strictly_by_form(flux):
    transformer, adapter, kwargs = flux
    plan = plan_for(transformer, adapter, *OPERATIONS)
    trained, student = copy.deepcopy(transformer), copy.deepcopy(transformer)
    reshape(trained, adapter, plan, kwargs)
    randomize(trained, seed=5)
    bank = {
        form.key: block.state_dict() for block, form in student_blocks(trained, adapter, plan) if not form.is_teacher
    }
    reshape(student, adapter, plan, kwargs)
    load_bank(student, adapter, plan, bank)
    for (block, form), (source, _) in zip(
        student_blocks(student, adapter, plan), student_blocks(trained, adapter, plan), strict=True
    ):
        expected = transformer.get_submodule(form.stack)[form.first] if form.is_teacher else source
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in block.state_dict().items())
    key = f"{STACK}.3-3.text_2-2_inside"
    with pytest.raises(PpclError, match=f"no weights for {key}"):
        load_bank(student, adapter, plan, {k: v for k, v in bank.items() if k != key})
    with pytest.raises(PpclError, match="do not fit"):
        load_bank(student, adapter, plan, {**bank, key: {}})


def test_block_lists_in_the_config_are_renumbered():
    transformer = sd3_transformer(5)
    reshape(transformer, SD3, plan_for(transformer, SD3, Interval(stack=STACK, first=0, last=1)), sd3_inputs())
    assert transformer.config["dual_attention_layers"] == (0, 1)
    stock = type(transformer).from_config(transformer.config).eval()
    stock.load_state_dict(transformer.state_dict(), strict=True)
    assert torch.equal(run(stock, sd3_inputs()), run(transformer, sd3_inputs()))


def test_position_dependent_block_needs_a_remap():
    """SD3's last block returns no text: an interval that ends there cannot keep its first block as it is."""
    transformer = sd3_transformer(4)
    plan = plan_for(transformer, SD3, Interval(stack=STACK, first=2, last=3))
    without = dataclasses.replace(SD3, remap=None)
    with pytest.raises(PpclError, match="has other weights and no remap"):
        reshape(copy.deepcopy(transformer), without, plan, sd3_inputs())
    kept = transformer.transformer_blocks[2]
    reshape(transformer, SD3, plan, sd3_inputs())
    last = transformer.transformer_blocks[2]
    assert last.context_pre_only
    assert last.use_dual_attention
    assert transformer.config["dual_attention_layers"] == (0, 2)
    assert not any(value.is_meta for value in transformer.state_dict().values())
    with torch.no_grad():
        calls = stack_calls(transformer, SD3, STACK, sd3_inputs())
        streams = dict(zip(("hidden_states", "encoder_hidden_states"), calls.streams, strict=True))
        arguments = calls.arguments[0]
        assert torch.allclose(last(**arguments, **streams)[1], kept(**arguments, **streams)[1], atol=1e-6)


@torch.no_grad()
def test_an_interval_that_ends_with_mochi_makes_no_text():
    """Its last block only reads the text: what another one has to make text goes, and the velocity is as it was."""
    transformer, adapter = videos.mochi().transformer, load_adapter("mochi")
    torch.manual_seed(1)
    kwargs = {
        "hidden_states": torch.randn(2, 12, 2, 4, 4),
        "encoder_hidden_states": torch.randn(2, 16, 32),
        "timestep": torch.full((2,), 300.0),
        "encoder_attention_mask": torch.arange(16).expand(2, 16) < 9,
        "return_dict": False,
    }
    plan = plan_for(transformer, adapter, Interval(stack=STACK, first=2, last=3))
    teacher = copy.deepcopy(transformer)
    last = teacher.transformer_blocks[3]
    last.forward = lambda hidden_states, encoder_hidden_states, **_: (hidden_states, encoder_hidden_states)
    reshape(transformer, adapter, plan, kwargs)
    assert transformer.transformer_blocks[2].ff_context is None
    assert size(transformer) < size(teacher) - size(last)
    assert torch.equal(run(transformer, kwargs), run(teacher, kwargs))


@pytest.mark.parametrize("last", [2, 3])
def test_a_student_has_the_shape_of_its_place(last):
    transformer = sd3_transformer(4)
    before = dict(transformer.named_parameters())
    form = Form(STACK, 1, last)
    student = transformer.transformer_blocks[1]
    found = standing_in(transformer, SD3, form, student)
    assert dict(transformer.named_parameters()).items() == before.items()
    plan = plan_for(transformer, SD3, Interval(stack=STACK, first=1, last=last))
    stock = copy.deepcopy(transformer)
    reshape(stock, SD3, plan, sd3_inputs())
    load_bank(stock, SD3, plan, {form.key: found.state_dict()})
    assert all(torch.equal(v, stock.transformer_blocks[1].state_dict()[n]) for n, v in found.state_dict().items())
    assert found.context_pre_only == (last == 3)


def test_plan_for_another_teacher_is_refused(flux):
    transformer, adapter, kwargs = flux
    plan = Plan(family="flux", depths={STACK: 19, "single_transformer_blocks": 38})
    with pytest.raises(PpclError, match="'transformer_blocks': 19"):
        reshape(transformer, adapter, plan, kwargs)
