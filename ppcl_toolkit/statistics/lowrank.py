"""The map of low rank that is nearest to a linear layer on recorded inputs, in closed form (reduced-rank regression).

Shapes: V vectors, D input features, R rows (output features), K rank.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor


@final
class Vectors:
    """Sums over vectors e, in fp64, from which mean and covariance follow."""

    def __init__(self, features: int) -> None:
        self.sum_D = torch.zeros(features, dtype=torch.float64)
        self.gram_DD = torch.zeros(features, features, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, e_VD: Tensor) -> None:
        """Count more vectors; there are few of them, so products in fp64 cost nothing that matters."""
        e = e_VD.detach().double()
        self.sum_D += e.sum(0).to(self.sum_D.device)
        self.gram_DD += (e.T @ e).to(self.gram_DD.device)
        self.count += len(e)

    def state(self) -> dict[str, Tensor]:
        """Return all sums."""
        return {"sum_D": self.sum_D, "gram_DD": self.gram_DD, "count": self.count}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self.sum_D, self.gram_DD, self.count = tensors["sum_D"], tensors["gram_DD"], tensors["count"]

    def spread(self, device: torch.device | str = "cpu") -> "Spread":
        """Return mean and principal directions, on `device`."""
        mean = (self.sum_D / self.count).to(device)
        return Spread(mean, self.gram_DD.to(device) / self.count.to(device) - torch.outer(mean, mean))


@final
class Spread:
    """Mean m and covariance C of vectors e."""

    def __init__(self, mean_D: Tensor, covariance_DD: Tensor) -> None:
        self.mean_D, self.covariance_DD = mean_D, covariance_DD

    @cached_property
    def root_DD(self) -> Tensor:
        """A square root of C: its columns are principal directions times their deviations."""
        values, directions = torch.linalg.eigh(self.covariance_DD)
        return directions * values.clamp(min=0).sqrt()


class LowRank(NamedTuple):
    """W e + b as `up` (`down` e) + `bias`: what the first k columns and rows of the two give is the best of rank k."""

    down_KD: Tensor
    up_RK: Tensor
    mean_R: Tensor
    """W m."""
    off_K: Tensor
    """`down` m."""

    def at(self, rank: int, bias_R: Tensor | None = None) -> dict[str, Tensor]:
        """Return the state dict of `Sequential(Linear(D, rank), Linear(rank, R))`, in fp32.

        The changed bias is b + W m - up (down m): the mean is mapped exactly.
        """
        bias = self.mean_R - self.up_RK[:, :rank] @ self.off_K[:rank]
        if bias_R is not None:
            bias = bias + bias_R.to(bias)
        found = {"0.weight": self.down_KD[:rank], "1.weight": self.up_RK[:, :rank], "1.bias": bias}
        return {name: value.float().cpu().contiguous() for name, value in found.items()}


def reduced_rank(weight_RD: Tensor, spread: Spread, rank: int) -> LowRank:
    """Return the maps of ranks 1 to `rank` that minimise the mean of |W (e - m) - W_k (e - m)|^2.

    W C^(1/2) = Q S P^T gives W_k = Q_k Q_k^T W (reduced-rank regression with W itself as the full solution): the
    principal directions of W e, not of e.
    """
    weight = weight_RD.detach().to(spread.mean_D)
    spread_RD = weight @ spread.root_DD
    _, directions = torch.linalg.eigh(spread_RD.T @ spread_RD)
    # Orthonormal again, whatever rounding left of directions that carry next to nothing.
    up_RK, _ = torch.linalg.qr(spread_RD @ directions.flip(1)[:, :rank])
    down_KD = up_RK.T @ weight
    return LowRank(down_KD, up_RK, weight @ spread.mean_D, down_KD @ spread.mean_D)
