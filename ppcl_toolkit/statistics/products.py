"""Matrix products as exact as their factors, or more so. Shapes: T tokens, D features."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices on `device` in fp32, whatever a program allows elsewhere: TF32, bf16, or autocast."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def fast_fp64(device: torch.device) -> bool:
    """Tell whether fp64 runs at half the speed of fp32 or better: on CPUs, and the data-centre GPUs of most years."""
    if device.type != "cuda" or torch.version.hip:
        return True
    # P100, V100, A100, H100, B200.
    return torch.cuda.get_device_capability(device) in {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


@final
class Split(NamedTuple):
    """Features as integers up to 256 and a rest of at most a half, each feature in a power of two of its own.

    Products of such integers are exact in fp32, and so are sums of 256 of them: only the rest's part is rounded.
    """

    high_TD: Tensor
    low_TD: Tensor
    unit_D: Tensor

    @classmethod
    def of(cls, x_TD: Tensor) -> Self:
        """Take fp32 features apart; nothing is lost."""
        largest_D = x_TD.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny * 2**16)
        unit_D = torch.ldexp(torch.ones_like(largest_D), torch.frexp(largest_D).exponent - 8)
        scaled_TD = x_TD / unit_D
        high_TD = scaled_TD.round()
        return cls(high_TD, scaled_TD - high_TD, unit_D.double())

    def square(self) -> Tensor:
        """X^T X: [D, D] in fp64."""
        mixed = ((self.high_TD + self.low_TD / 2).T @ self.low_TD).double()
        return _exactly(self.high_TD, self.high_TD).add_(mixed).add_(mixed.T) * self.unit_D[:, None] * self.unit_D

    def times(self, other: "Split") -> Tensor:
        """X^T Y: [D, D] in fp64."""
        mixed = self.high_TD.T @ other.low_TD + self.low_TD.T @ (other.high_TD + other.low_TD)
        return _exactly(self.high_TD, other.high_TD).add_(mixed) * self.unit_D[:, None] * other.unit_D


def _exactly(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    total = torch.zeros(x_TD.shape[1], y_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    for x, y in zip(x_TD.split(256), y_TD.split(256), strict=True):
        total += x.T @ y
    return total
