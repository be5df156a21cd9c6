"""What belongs to one sample of a recorded call, and samples as a call again: a round trip for every kind of value."""

import pytest
import torch

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.noise import collate
from ppcl_toolkit.running.rows import Uneven, joined, row, unlike_rows


def numbers(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


VALUES = {
    "tensor": numbers(3, 2, 4),
    "tuple of tensors": (numbers(3, 2), numbers(3, 5, 1)),
    "list of tensors": [numbers(3, 2), -numbers(3, 2), numbers(3, 4)],
    "as many tensors as samples": [numbers(3, 2), -numbers(3, 2), numbers(3, 4)],
    "nested": {"a": (numbers(3, 2), None), "b": [(numbers(3, 1), numbers(3, 2))], "c": 1.5},
    "plain list": [[(1, 2, 3)], [(4, 5, 6)], [(7, 8, 9)]],
    "plain tuple": (1, (2.0, "x")),
    "flag": True,
    "nothing": None,
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_rows_join_to_what_they_came_of(value):
    assert same(joined([row(value, index, 3) for index in range(3)], "x"), value)


def test_each_tensor_gives_the_row_of_its_sample():
    middle = {"a": (torch.tensor([[2.0, 3.0]]), None), "b": [(torch.ones(1, 1), torch.tensor([[2.0, 3.0]]))], "c": 1.5}
    assert same(row(VALUES["nested"], 1, 3), middle)


def test_a_negative_that_is_padded_to_another_length_is_the_same():
    """As pipelines pad it that join both prompts in one call."""
    negative, one, other = torch.full((1, 2, 4), 7.0), torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    calls = []
    for prompt in (one, other):
        padded = torch.cat([negative, torch.zeros(1, prompt.shape[1] - 2, 4)], 1)
        mask = torch.tensor([[1, 1] + [0] * (prompt.shape[1] - 2), [1] * prompt.shape[1]])
        calls.append({"text": torch.cat([padded, prompt]), "mask": mask})
    assert unlike_rows(*calls, 2) == [1]


def test_where_latents_are_a_list_so_are_other_lists():
    """Texts of Z-Image: one tensor for each sample, of any lengths, also where a length happens to be the batch."""
    texts = [numbers(2, 4), -numbers(2, 4)]
    rows = [row(texts, index, 2, listed=True) for index in range(2)]
    assert same(rows, [[numbers(2, 4)], [-numbers(2, 4)]])
    assert same(joined(rows, "x", listed=True), texts)


@pytest.mark.parametrize(
    ("value", "found"),
    [(numbers(4, 2), 4), ((numbers(3, 2), numbers(5, 2)), 5), ([1, 2], 2), (torch.tensor(1.0), "a single number")],
)
def test_what_has_no_row_for_each_sample_says_how_many(value, found):
    with pytest.raises(Uneven) as caught:
        row(value, 0, 3)
    assert caught.value.args == (found,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1.0, 2.0),
        (None, torch.zeros(1, 2)),
        (torch.zeros(1, 2), None),
        ((1, 2), (1, 2, 3)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, 1),
    ],
)
def test_rows_of_different_kinds_do_not_join(one, other):
    with pytest.raises(PpclError, match="samples of one batch differ in x"):
        joined([one, other], "x")


def test_shared_arguments_are_not_joined():
    """CogVideoX's pipeline passes the same pair of rotary embeddings for all samples."""
    calls = [{"rotary": (numbers(6, 2), -numbers(6, 2)), "layers": [7, 8]}] * 2
    assert same(collate(calls, ("rotary", "layers")), calls[0])
    with pytest.raises(PpclError, match=r"samples of one batch differ in layers: \[7, 8\] and others"):
        collate([calls[0], {**calls[0], "layers": [7]}], ("rotary", "layers"))
