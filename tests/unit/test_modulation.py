"""Modulation of low rank: the plan's rules, the closed form against numpy, students against stock models, sizes."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from by_hand import hand_made
from families import TRANSFORMERS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import (
    FfnSwap,
    Form,
    Interval,
    ModulationSwap,
    Plan,
    TextRun,
    low_rank_forms,
    trained_forms,
)
from ppcl_toolkit.statistics.lowrank import Vectors, reduced_rank
from ppcl_toolkit.surgery.assemble import count_parameters, load_bank, reshape, student_blocks, student_of

STACK, SINGLE = "transformer_blocks", "single_transformer_blocks"
EMPTY = Plan(family="flux", depths={"a": 8, "b": 4})
FULL_SIZE = [
    ("qwen_image", "Qwen/Qwen-Image", 20_430_401_088, 13_718_203_968),
    ("flux", "black-forest-labs/FLUX.1-dev", 11_901_408_320, 8_714_982_464),
    ("flux", "Freepik/flux.1-lite-8B", 8_163_264_064, 6_207_407_680),
    ("sd3", "stabilityai/stable-diffusion-3.5-large", 8_056_627_520, 5_424_308_544),
    ("sd3", "stabilityai/stable-diffusion-3.5-medium", 2_243_171_520, 1_499_354_304),
]


def low(rank=4, *, stack="a", blocks=None):
    return ModulationSwap(stack=stack, rank=rank, blocks=blocks)


def everywhere(adapter, rank):
    return [ModulationSwap(stack=stack.path, rank=rank) for stack in adapter.stacks]


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def run(transformer, kwargs):
    return transformer(**kwargs)[0]


def test_a_swap_of_a_stack_and_of_single_blocks():
    plan = EMPTY.with_operations([low(), low(2, stack="b", blocks=(1,)), Interval(stack="a", first=2, last=4)])
    assert [form.modulation for form in plan.forms()] == [4] * 6 + [0, 2, 0, 0]
    assert not plan.is_depth_only
    forms = {form.key: form for form in plan.forms()}
    assert {"a.2-4.modulation_4", "a.0-0.modulation_4", "b.1-1.modulation_2", "b.0-0"} <= forms.keys()
    assert forms["a.2-4.modulation_4"].previous == Form("a", 2, 4)
    assert forms["a.0-0.modulation_4"].previous.is_teacher
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_low_rank_is_made_and_not_trained():
    plan = EMPTY.with_operations(
        [Interval(stack="a", first=2, last=4), FfnSwap(stack="a", block=5, streams=("image",))]
    )
    wider = plan.with_operations([*plan.operations, low()])
    assert trained_forms([wider]) == trained_forms([plan])
    assert len(low_rank_forms([wider, wider])) == 6
    assert low_rank_forms([plan]) == []


@pytest.mark.parametrize(
    ("operations", "rule"),
    [
        ([low(blocks=(8,))], "blocks 0 to 7"),
        ([low(blocks=())], "no block is named"),
        ([low(), low(2, blocks=(1,))], "block 1 has low rank already"),
        ([low(blocks=(3,)), Interval(stack="a", first=2, last=4)], "block 3 is removed by an interval"),
        ([low(stack="c")], "no such stack"),
    ],
)
def test_rules(operations, rule):
    with pytest.raises(ValueError, match=rule):
        EMPTY.with_operations(operations)


def test_composition_keeps_what_is_left_of_it():
    first = EMPTY.with_operations([Interval(stack="a", first=0, last=1), low(blocks=(2, 3, 6)), low(2, stack="b")])
    later = Plan(family="flux", depths={"a": 7, "b": 4}).with_operations([Interval(stack="a", first=1, last=2)])
    both = first.compose(later)
    assert [str(o) for o in both.operations] == [
        "a[0,1]",
        "a[2,3]",
        "a[2,6] modulation of rank 4",
        "b modulation of rank 2",
    ]
    # On top of what is composed: blocks 0 and 4 of the student are 0 and 5 of the teacher.
    again = both.compose(Plan(family="flux", depths={"a": 6, "b": 4}).with_operations([low(3, blocks=(0, 3))]))
    assert {form.first: form.modulation for form in again.forms() if form.stack == "a"} == {
        0: 3,
        2: 4,
        4: 0,
        5: 3,
        6: 4,
        7: 0,
    }
    with pytest.raises(ValueError, match="has low rank already"):
        both.compose(Plan(family="flux", depths={"a": 6, "b": 4}).with_operations([low(3)]))


def vectors(count=60, features=12, seed=0):
    """Conditioning near a plane, far from zero, and a little in every direction."""
    g = np.random.default_rng(seed)
    basis = g.normal(size=(3, features))
    return 5 * g.normal(size=features) + g.normal(size=(count, 3)) @ basis + 0.05 * g.normal(size=(count, features))


def fitted(e, weight, rank):
    sums = Vectors(e.shape[1])
    for part in np.array_split(e, 7):
        sums.add(torch.from_numpy(part))
    return reduced_rank(torch.from_numpy(weight), sums.spread(), rank)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_closed_form_is_the_least_squares_optimum(rank):
    """numpy: the best approximation of rank k of the outputs themselves (Eckart and Young), straight from the data."""
    g = np.random.default_rng(1)
    e, weight, bias = vectors(), g.normal(size=(30, 12)), g.normal(size=30)
    outputs = e @ weight.T + bias
    centred = outputs - outputs.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank] + outputs.mean(0)
    state = fitted(e, weight, 5).at(rank, torch.from_numpy(bias))
    pair = nn.Sequential(nn.Linear(12, rank, bias=False), nn.Linear(rank, 30))
    pair.load_state_dict(state)
    found = pair(torch.from_numpy(e).float()).detach().numpy()
    assert np.abs(found - best).max() < 1e-4 * np.abs(centred).max()


def test_the_optimum_weighs_by_what_the_layer_makes_of_it():
    """A direction with little energy that the layer reads comes before one with much that it does not."""
    g = np.random.default_rng(2)
    e = g.normal(size=(200, 6)) * [10, 1, 0.01, 0.01, 0.01, 0.01]
    weight = g.normal(size=(9, 6)) * [0.001, 1, 1, 1, 1, 1]
    kept = fitted(e, weight, 1)
    missed = (e - e.mean(0)) @ (weight - (kept.up_RK @ kept.down_KD).numpy()).T
    assert np.square(missed).sum() < 0.01 * np.square((e - e.mean(0)) @ weight.T).sum()


def test_inputs_that_never_vary_cost_nothing():
    e, weight = np.ones((5, 4)), np.random.default_rng(3).normal(size=(7, 4))
    found = fitted(e, weight, 2).at(2)
    assert all(value.isfinite().all() for value in found.values())
    made = found["1.weight"] @ (found["0.weight"] @ torch.ones(4)) + found["1.bias"]
    assert torch.allclose(made.double(), torch.from_numpy(weight.sum(1)), atol=1e-5)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_student_equals_the_teacher_with_layers_replaced_by_hand(family):
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    plan = Plan(family=adapter.family, depths=adapter.depths(transformer)).with_operations(everywhere(adapter, 3))
    teacher, bank = hand_made(transformer, kwargs, adapter, 3)
    student = student_of(transformer, adapter, plan, bank, kwargs)
    assert torch.allclose(run(student, kwargs), run(transformer, kwargs), atol=1e-4)  # few vectors were seen
    kwargs = {**kwargs, "timestep": kwargs["timestep"].flip(0) * 0.3}
    expected = run(teacher, kwargs)
    differs = (run(transformer, kwargs) - expected).abs().max()
    assert (run(student, kwargs) - expected).abs().max() < 1e-2 * differs
    assert size(student) == count_parameters(transformer, adapter, plan, kwargs) < 0.8 * size(transformer)
    # What is not of low rank is the teacher's very memory.
    own, teachers = (t.get_submodule(f"{STACK}.1.attn.to_q").weight for t in (student, transformer))
    assert own.data_ptr() == teachers.data_ptr()


@pytest.mark.parametrize(("family", "model", "whole", "expected"), FULL_SIZE)
def test_counts_at_rank_32(family, model, whole, expected):
    adapter = load_adapter(family)
    with torch.device("meta"):
        transformer = getattr(diffusers, adapter.transformer).from_config(dict(adapter.models[model]))
        shapes = adapter.example(transformer.config, {}, 0)
        kwargs = {name: torch.empty(s, device="meta") if isinstance(s, tuple) else s for name, s in shapes.items()}
    plan = Plan(family=family, depths=adapter.depths(transformer))
    assert count_parameters(transformer, adapter, plan, kwargs) == whole
    assert count_parameters(transformer, adapter, plan.with_operations(everywhere(adapter, 32)), kwargs) == expected


MIXED = (
    Interval(stack=STACK, first=0, last=1),
    TextRun(stack=STACK, reference=2, last=3),
    FfnSwap(stack=STACK, block=2, streams=("image", "text")),
)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_it_composes_with_every_other_operation(family):
    """Rows that are gone stay gone: a block has the layers of its narrow form, each factored."""
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    plan = Plan(family=adapter.family, depths=adapter.depths(transformer)).with_operations(MIXED)
    wider = copy.deepcopy(transformer)
    reshape(wider, adapter, plan, kwargs)
    student = copy.deepcopy(transformer)
    reshape(student, adapter, plan.with_operations([*MIXED, *everywhere(adapter, 3)]), kwargs)
    for (block, form), (origin, _) in zip(
        student_blocks(student, adapter, plan), student_blocks(wider, adapter, plan), strict=True
    ):
        for path in adapter.stack(form.stack).modulation:
            layer, pair = dict(origin.named_modules()).get(path), dict(block.named_modules()).get(path)
            assert (layer is None) == (pair is None)
            if layer is not None:
                assert [tuple(p.shape) for p in pair.parameters()] == [
                    (3, layer.in_features),
                    (layer.out_features, 3),
                    (layer.out_features,),
                ]
                with torch.no_grad():
                    # Exact again where the rank is that of the weight: then both models are the same.
                    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                    layer.weight.copy_((u[:, :3] * s[:3]) @ v[:3])
                    pair[0].weight.copy_(v[:3])
                    pair[1].weight.copy_(u[:, :3] * s[:3])
                    pair[1].bias.copy_(layer.bias)
    assert torch.allclose(run(student, kwargs), run(wider, kwargs), atol=1e-4)


def test_a_bank_is_strict_about_low_rank():
    transformer, adapter, kwargs = TRANSFORMERS["flux"]()
    plan = Plan(family="flux", depths=adapter.depths(transformer)).with_operations(everywhere(adapter, 3))
    _, bank = hand_made(transformer, kwargs, adapter, 3)
    student = copy.deepcopy(transformer)
    reshape(student, adapter, plan, kwargs)
    key = f"{STACK}.1-1.modulation_3"
    with pytest.raises(PpclError, match=f"no weights for {key}"):
        load_bank(student, adapter, plan, {k: v for k, v in bank.items() if k != key})
    with pytest.raises(PpclError, match="do not fit"):
        load_bank(student, adapter, plan, {**bank, key: {}})


@pytest.mark.parametrize("rank", [28, 33, 1000])
def test_a_rank_that_saves_nothing_is_refused(rank):
    """32 features, 192 rows: from rank 28 on two maps are larger than the one, and beyond 32 nothing is of low rank."""
    transformer, adapter, kwargs = TRANSFORMERS["flux"]()
    plan = Plan(family="flux", depths=adapter.depths(transformer))
    assert count_parameters(transformer, adapter, plan.with_operations([low(27, stack=STACK)]), kwargs) < size(
        transformer
    )
    with pytest.raises(PpclError, match=f"rank {rank} saves nothing: {STACK} is 32 wide"):
        count_parameters(transformer, adapter, plan.with_operations([low(rank, stack=STACK)]), kwargs)


def compiled(transformer, kwargs):
    """How often its blocks are compiled; they give what they gave."""
    expected = run(transformer, kwargs)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(backend=counter, fullgraph=True)
    assert torch.allclose(run(transformer, kwargs), expected, atol=1e-5)
    return counter.frame_count


def test_checkpointing_and_compile():
    transformer, adapter, kwargs = TRANSFORMERS["flux"]()
    plan = Plan(family="flux", depths=adapter.depths(transformer)).with_operations(everywhere(adapter, 3))
    student = student_of(transformer, adapter, plan, hand_made(transformer, kwargs, adapter, 3)[1], kwargs)
    student.requires_grad_(True).train()

    def gradients():
        student.zero_grad()
        student(**kwargs)[0].square().sum().backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    plain = gradients()
    student.enable_gradient_checkpointing()
    assert all(torch.equal(value, plain[name]) for name, value in gradients().items())
    assert all(plain[f"{STACK}.0.norm1.linear.{name}"].any() for name in ("0.weight", "1.weight", "1.bias"))
    student.disable_gradient_checkpointing()
    student.eval().requires_grad_(False)
    assert compiled(student, kwargs) == compiled(transformer, kwargs)


def test_depth_goes_on_from_low_rank():
    """SD3's last block has other rows than the rest, of low rank, too."""
    transformer, adapter, kwargs = TRANSFORMERS["sd3"]()
    plan = Plan(family="sd3", depths=adapter.depths(transformer)).with_operations(everywhere(adapter, 3))
    student = student_of(transformer, adapter, plan, hand_made(transformer, kwargs, adapter, 3)[1], kwargs)
    interval = Interval(stack=STACK, first=2, last=3)
    shorter = copy.deepcopy(student)
    reshape(shorter, adapter, Plan(family="sd3", depths={STACK: 4}, operations=(interval,)), kwargs)
    # The same by hand: a stock model of that depth, with every layer multiplied out.
    whole = copy.deepcopy(transformer)
    for index, block in enumerate(whole.transformer_blocks):
        for path in ("norm1", "norm1_context"):
            pair = student.get_submodule(f"{STACK}.{index}.{path}.linear")
            with torch.no_grad():
                block.get_submodule(path).linear.weight.copy_(pair[1].weight @ pair[0].weight)
                block.get_submodule(path).linear.bias.copy_(pair[1].bias)
    reshape(whole, adapter, Plan(family="sd3", depths={STACK: 4}, operations=(interval,)), kwargs)
    assert torch.allclose(run(shorter, kwargs), run(whole, kwargs), atol=1e-5)
    assert shorter.transformer_blocks[2].context_pre_only
