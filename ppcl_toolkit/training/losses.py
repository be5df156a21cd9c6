"""Distances between what a student made and what the teacher made, over the streams that both have.

Every loss is computed in fp32 at least and returns a scalar: the sum over streams of a mean over the batch, so that the
mean over ranks is the loss of the whole batch. Shapes: B batch, N tokens, D features.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from ppcl_toolkit.running.capture import Streams, each_alone

Loss = Callable[[Streams, Streams], Tensor]
"""`loss(student, target)`."""


def direction(student: Streams, target: Streams) -> Tensor:
    """Compare directions alone, the paper's loss: |Norm(s) - Norm(t)|^2 = 2 - 2 cos (Eq. 6, 11).

    Norm divides each token by its L2 norm along the features. The square is summed over features and averaged over
    tokens and batch: each stream counts from 0 (same direction) to 4 (opposite), whatever its length.
    """
    return _over_streams(student, target, _direction)


def relative_mse(student: Streams, target: Streams) -> Tensor:
    """Compare values: |s - t|^2 / |t|^2, both summed over a sample's tokens and features, averaged over the batch."""
    return _over_streams(student, target, _relative_mse)


def direction_magnitude(student: Streams, target: Streams) -> Tensor:
    """Compare directions (Eq. 6), plus lengths: (|s| / |t| - 1)^2 per token, averaged over tokens and batch."""
    return _over_streams(student, target, lambda s, t: _direction(s, t) + _magnitude(s, t))


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {"direction": direction, "relative_mse": relative_mse, "direction_magnitude": direction_magnitude}
)
"""The losses of a segment, by the names used in recipes."""


def without_padding(loss: Loss, student: Streams, target: Streams, unpadded_BN: Tensor | None) -> Tensor:
    """Return the mean of what every sample loses by itself, without the padding of its text."""
    if unpadded_BN is None:
        return loss(student, target)
    pairs = zip(each_alone(student, unpadded_BN), each_alone(target, unpadded_BN), strict=True)
    return torch.stack([loss(own, aim) for own, aim in pairs]).mean()


def _over_streams(student: Streams, target: Streams, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    pairs = [(s, t) for s, t in zip(student, target, strict=True) if s is not None and t is not None]
    assert pairs, "student and target have no stream in common"
    return torch.stack([loss(_exact(s), _exact(t)) for s, t in pairs]).sum()


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _direction(s_BND: Tensor, t_BND: Tensor) -> Tensor:
    difference = functional.normalize(s_BND, dim=-1) - functional.normalize(t_BND, dim=-1)
    return difference.square().sum(-1).mean()


def _relative_mse(s_BND: Tensor, t_BND: Tensor) -> Tensor:
    error_B = (s_BND - t_BND).square().sum(dim=(1, 2))
    return (error_B / t_BND.square().sum(dim=(1, 2)).clamp(min=_tiny(t_BND))).mean()


def _magnitude(s_BND: Tensor, t_BND: Tensor) -> Tensor:
    ratio_BN = s_BND.norm(dim=-1) / t_BND.norm(dim=-1).clamp(min=_tiny(t_BND))
    return (ratio_BN - 1).square().mean()


def _tiny(x: Tensor) -> float:
    return 1e-12 if x.dtype == torch.float32 else 1e-30
