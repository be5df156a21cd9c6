"""Masks on the meta device whose numbers a transformer looks at."""

import torch

from ppcl_toolkit.running.numbers import Numbers
from ppcl_toolkit.running.placement import moved


def mask():
    return Numbers(torch.tensor([[True, True, False], [True, True, True]]))


def test_what_is_asked_of_a_mask_alone_is_answered():
    assert mask().is_meta and mask().shape == (2, 3)
    lengths = mask().sum(dim=1)
    assert lengths.tolist() == [2, 3] and max(lengths.tolist()) == 3
    assert int(mask().sum()) == 5 and bool(mask().all()) is False
    assert torch.nonzero(mask()[0]).flatten().tolist() == [0, 1]
    assert mask().float().to("meta").mul(2).tolist() == [[2, 2, 0], [2, 2, 2]]


def test_with_tensors_that_have_no_data_it_has_none():
    other = torch.empty(4, 2, 3, device="meta")
    made = mask().float() * other
    assert made.is_meta and made.shape == (4, 2, 3) and not isinstance(made, Numbers)
    assert other[:, :, torch.nonzero(mask()[0]).flatten()].shape == (4, 2, 2)


def test_it_is_moved_as_others_are():
    found = moved({"mask": mask()}, torch.device("meta"))["mask"]
    assert found.tolist() == [[True, True, False], [True, True, True]]
