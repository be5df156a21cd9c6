import math

import pytest
import torch

from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.training.losses import LOSSES, direction, direction_magnitude, relative_mse


def streams(seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return Streams(scale * torch.randn(2, 5, 4, generator=g), scale * torch.randn(2, 3, 4, generator=g))


def by_token(student, target, term):
    """Sum over streams of the mean of `term` over tokens, one token at a time."""
    total = 0.0
    for s, t in zip(student, target, strict=True):
        values = [term(s[b, n], t[b, n]) for b in range(s.shape[0]) for n in range(s.shape[1])]
        total += sum(values) / len(values)
    return float(total)


def equation_6(s, t):
    return ((s / s.norm() - t / t.norm()) ** 2).sum()


def test_direction_is_equation_6_token_by_token():
    assert direction(streams(0), streams(1)).item() == pytest.approx(by_token(streams(0), streams(1), equation_6))


def test_direction_does_not_see_lengths():
    torch.testing.assert_close(direction(streams(0, 100.0), streams(1)), direction(streams(0), streams(1)))
    opposite = Streams(*(-x for x in streams(0)))
    assert direction(opposite, streams(0)).item() == pytest.approx(2 * 4)


def test_direction_magnitude_adds_the_error_of_lengths():
    def term(s, t):
        return equation_6(s, t) + (s.norm() / t.norm() - 1) ** 2

    expected = by_token(streams(0), streams(1), term)
    assert direction_magnitude(streams(0), streams(1)).item() == pytest.approx(expected, rel=1e-5)
    assert direction_magnitude(streams(0, 3.0), streams(0)).item() == pytest.approx(2 * 4.0, rel=1e-5)


def test_relative_mse_is_a_ratio_of_energies_per_sample():
    student, target = streams(0), streams(1)
    expected = sum(
        float((s[b] - t[b]).square().sum() / t[b].square().sum()) / 2
        for s, t in zip(student, target, strict=True)
        for b in range(2)
    )
    assert relative_mse(student, target).item() == pytest.approx(expected, rel=1e-5)
    bigger = relative_mse(streams(0, 1000.0), streams(1, 1000.0))
    torch.testing.assert_close(bigger, relative_mse(student, target))


@pytest.mark.parametrize("loss", LOSSES.values())
def test_streams_that_one_side_lacks_are_skipped(loss):
    student, target = streams(0), streams(1)
    image = loss(Streams(student.image), Streams(target.image))
    assert loss(student, target) > image
    torch.testing.assert_close(loss(Streams(student.image), target), image)
    torch.testing.assert_close(loss(student, Streams(target.image)), image)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_losses_are_zero_at_the_target_and_always_have_a_gradient(loss):
    target = streams(1)
    assert loss(target, target).item() == pytest.approx(0.0, abs=1e-6)
    for student in (streams(0), Streams(*(torch.zeros_like(x) for x in target))):
        student = Streams(*(x.clone().requires_grad_() for x in student))
        loss(student, target).backward()
        assert all(x.grad.isfinite().all() for x in student)
    zeros = Streams(*(torch.zeros_like(x) for x in target))
    assert math.isfinite(loss(zeros, zeros).item())


@pytest.mark.parametrize("loss", LOSSES.values())
def test_low_precision_is_compared_in_fp32(loss):
    half, target = (Streams(*(x.to(torch.bfloat16) for x in streams(seed, 300.0))) for seed in (0, 1))
    value = loss(half, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(Streams(*(x.float() for x in half)), Streams(*(x.float() for x in target))))


def test_recipes_name_every_loss():
    assert list(LOSSES) == ["direction", "relative_mse", "direction_magnitude"]
