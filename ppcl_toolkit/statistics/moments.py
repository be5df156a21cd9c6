"""Normal equations of a residual linear map y = x + W x, summed up token by token (Eq. 1).

One pass over the data replaces the training of a probe: Eq. 2 is quadratic in W, and these sums hold all of it.
Shapes: D features; X and Y are rows of tokens, [..., D].
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self, final

import torch
from torch import Tensor

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.statistics.products import Split, fast_fp64, full_precision

_PART = 2048
"""Tokens that are centred together where products are in fp32: 0.5 GB of work at D = 3072."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over tokens, in fp64, of an input x and its update d = y - x: what Eq. 1 and Eq. 2 need to know."""

    inputs_DD: Tensor
    """Sum of x x^T."""
    updates_DD: Tensor
    """Sum of d x^T."""
    input_D: Tensor
    """Sum of x."""
    update_D: Tensor
    """Sum of d."""
    energy: Tensor
    """Sum of |d|^2, a scalar."""
    count: Tensor
    """Number of tokens, a scalar."""

    @classmethod
    def zeros(cls, features: int, device: str | torch.device = "cpu") -> Self:
        """Return the moments of no tokens; sums stay on `device`, wherever the tokens are."""
        shapes = ((features, features), (features, features), (features,), (features,), (), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count more tokens, in place: inputs `x` and outputs `y` of the map, each [..., D].

        Products are in fp64 on the CPU and on GPUs that are made for it. On others it takes 32 to 64 times as long as
        fp32, of which they are put together.
        """
        x, y = (side.detach().flatten(0, -2) for side in (x, y))
        sums = _in_fp64(x, y) if x.dtype == torch.float64 or fast_fp64(x.device) else in_parts(x, y)
        tokens = torch.tensor(float(len(x)), dtype=torch.float64)
        for total, more in zip(self.tensors().values(), (*sums, tokens), strict=True):
            total += more.to(total.device)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of tokens."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return Moments(*(one + another for one, another in pairs))

    def solve(self, ridge: float = 1e-6, *, bias: bool = False) -> Tensor:
        """Solve Eq. 1: W [D, D] that minimises |x + W x - y|^2 + `ridge` * sum_j |x_j - mean_j|^2 |W_j|^2, j a feature.

        So the units of a feature do not matter: those of one stream may differ by 10,000. With `bias`, x is extended by
        a one that the ridge leaves alone, and the last column of W [D, D + 1] is the bias. Raises `PpclError` where the
        tokens do not determine W, or are not finite.
        """
        gram, cross = self._system(bias=bias)
        if not (gram.isfinite().all() and cross.isfinite().all()):
            raise PpclError(
                "what a linear map is fitted to is not finite: a block that learned before it has come apart, for "
                "which a smaller learning_rate helps, or the teacher overflows, for which another teacher.dtype does"
            )
        features = len(self.input_D)
        if not gram.any():
            return torch.zeros_like(cross)
        system = gram.clone()
        system.diagonal()[:features] += ridge * self._spread()
        # Equilibrated: a pivot is lost to rounding by what its own feature is, not by what the largest is.
        scale = system.diagonal().rsqrt()
        factor, failed = torch.linalg.cholesky_ex(system.mul_(scale).mul_(scale[:, None]))
        if failed or not factor.isfinite().all():
            raise PpclError(
                f"the normal equations are singular: {int(self.count)} tokens of {features} features, "
                f"ridge {ridge:g}; take more tokens, or a larger ridge"
            )
        return (torch.cholesky_solve(scale[:, None] * cross.T, factor) * scale[:, None]).T.contiguous()

    def unexplained(self, weight: Tensor) -> float:
        """Return |d - W x|^2 / |d|^2 over all tokens, in closed form; `weight` as `solve` returns it.

        1 is a map that does nothing, 0 is a perfect one. Where there was no update, any zero map is perfect.
        """
        gram, cross = self._system(bias=weight.shape[1] > weight.shape[0])
        weight = weight.detach().to(gram)
        left = self.energy - 2 * (weight * cross).sum() + (weight @ gram * weight).sum()
        # Rounding may leave a perfect map slightly below zero.
        return max(0.0, float(left / self.energy.clamp(min=torch.finfo(torch.float64).tiny)))

    def to(self, device: torch.device) -> Self:
        """Return the same sums on `device`."""
        return type(self)(*(total.to(device) for total in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild from what `tensors` returned."""
        return cls(**tensors)

    def _spread(self) -> Tensor:
        """Return the sum of squares of every feature about its mean, [D]: at least a millionth of that about zero."""
        squares = self.inputs_DD.diagonal()
        about_mean = squares - self.input_D.square() / self.count
        spread = torch.maximum(about_mean, 1e-6 * squares)
        return spread.where(spread > 0, 1.0)

    def _system(self, *, bias: bool) -> tuple[Tensor, Tensor]:
        if not bias:
            return self.inputs_DD, self.updates_DD
        ones = torch.cat([self.input_D, self.count[None]])
        gram = torch.cat([torch.cat([self.inputs_DD, self.input_D[None]]), ones[:, None]], dim=1)
        return gram, torch.cat([self.updates_DD, self.update_D[:, None]], dim=1)


def in_parts(x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of x x^T, d x^T, x, d and |d|^2 over T tokens in fp64, from products in fp32.

    Each part of the tokens is centred, so that a feature's mean, which may be a thousand times its spread, costs no
    digits: with x = m + x' and n tokens, sum x x^T = sum x' x'^T + m s^T + s m^T + n m m^T for s = sum x'. What is left
    is multiplied as `Split`: seven digits of fp32 alone are not enough, for the ridge of Eq. 1 is a millionth of what a
    feature has.
    """
    with full_precision(x_TD.device):
        parts = (_part(*pair) for pair in zip(x_TD.split(_PART), y_TD.split(_PART), strict=True))
        return functools.reduce(lambda sums, more: tuple(map(torch.add, sums, more)), parts)


def _part(x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, ...]:
    # The update is exact where y is near x, as it is behind one block.
    x, d = x_TD.float(), y_TD.float() - x_TD.float()
    sum_x, sum_d = (side.sum(0, dtype=torch.float64) for side in (x, d))
    energy = d.double().square().sum()
    m, e = x.mean(0), d.mean(0)
    x, d = x - m, d - e
    s, t = (side.sum(0, dtype=torch.float64) for side in (x, d))
    m, e = m.double(), e.double()
    split = Split.of(x)
    gram = split.square() + torch.outer(m, s + len(x) * m) + torch.outer(s, m)
    cross = Split.of(d).times(split) + torch.outer(e, s + len(x) * m) + torch.outer(t, m)
    return gram, cross, sum_x, sum_d, energy


def _in_fp64(x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, ...]:
    # The update is taken in fp64: it may be a thousandth of x, and its energy is what is explained.
    x = x_TD.double()
    d = y_TD.double() - x
    return x.T @ x, d.T @ x, x.sum(0), d.sum(0), d.square().sum()
