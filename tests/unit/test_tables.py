"""Tables by the numbers of blocks, as Chroma has one: their rows go with the blocks, from student to variant and on."""

import pictures
import pytest
import torch

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.variant import load_compressed, save_variant, verify_variant
from ppcl_toolkit.checking.in_place import called_in_place
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.running.capture import answer
from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.surgery.assemble import is_stock, reshape
from ppcl_toolkit.surgery.copies import sharing_copy

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
TABLE = "time_text_embed.mod_proj"
ADAPTER = load_adapter("chroma")


def call():
    torch.manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([0.6]),
        "img_ids": torch.arange(12.0).view(4, 3),
        "txt_ids": torch.zeros(5, 3),
        "attention_mask": torch.ones(1, 9),
        "return_dict": False,
    }


def planned(transformer, *operations):
    return Plan(family="chroma", depths=ADAPTER.depths(transformer), operations=operations)


def student_of(transformer, plan):
    student = sharing_copy(transformer)
    reshape(student, ADAPTER, plan, call())
    return student


def skipping(transformer, dual, single):
    """The velocity without these blocks: each hands on what it is given."""
    for number in dual:
        block = transformer.transformer_blocks[number]
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    for number in single:
        transformer.single_transformer_blocks[number].forward = lambda hidden_states, **_: hidden_states
    return answer(transformer, call())


@torch.no_grad()
def test_a_variant_of_a_variant_is_the_teacher_without_the_blocks_of_both(tmp_path):
    pipeline = pictures.chroma()
    first = planned(pipeline.transformer, Interval(stack=DUAL, first=1, last=2))
    student = student_of(pipeline.transformer, first)
    assert not is_stock(ADAPTER, first) and TABLE in student.state_dict()
    with pytest.raises(PpclError, match="no stock class fits it"):
        student.save_pretrained(tmp_path / "wrong")
    assert save_variant(pipeline, student, first, call(), tmp_path / "first") == "custom"
    opened = load_compressed(tmp_path / "first")
    assert len(opened.transformer.transformer_blocks) == 2
    second = planned(opened.transformer, Interval(stack=SINGLE, first=0, last=1))
    smaller = student_of(opened.transformer, second)
    whole = first.compose(second)
    assert save_variant(opened, smaller, whole, call(), tmp_path / "second") == "custom"
    expected = skipping(pictures.chroma_transformer(), [2], [1])
    again = load_compressed(tmp_path / "second").transformer
    assert torch.equal(answer(again, call()), expected)
    assert torch.equal(answer(smaller, call()), expected)


@torch.no_grad()
def test_width_goes_along(tmp_path):
    pipeline = pictures.chroma()
    plan = planned(
        pipeline.transformer,
        Interval(stack=SINGLE, first=0, last=1),
        TextRun(stack=DUAL, reference=0, last=2),
        FfnSwap(stack=DUAL, block=1, streams=("image",)),
    )
    student = student_of(pipeline.transformer, plan)
    expected = called_in_place(pipeline.transformer, ADAPTER, plan, student, call(), HOST)
    assert torch.allclose(answer(student, call()), expected, atol=1e-6)
    assert save_variant(pipeline, student, plan, call(), tmp_path / "small") == "custom"
    # Opened as its users do, in processes of their own: by its own file, and by its plan.
    assert verify_variant(tmp_path / "small", "custom", call(), expected, 1e-5) < 1e-5


def test_without_an_interval_the_table_is_that_of_the_class():
    transformer = pictures.chroma_transformer()
    plan = planned(transformer, FfnSwap(stack=DUAL, block=1, streams=("image",)))
    assert TABLE not in student_of(transformer, plan).state_dict()
    assert is_stock(ADAPTER, planned(transformer))
