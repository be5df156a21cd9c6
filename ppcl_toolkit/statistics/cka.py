"""Linear centred kernel alignment (CKA): how alike two sets of features are, up to rotation and scale (Appendix 6).

Tokens are the examples, and every sample is compared on its own: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the
Gram matrices K = X X^T of centred features. Products are in fp32, for fp64 crawls on most GPUs, and sums in fp64:
between blocks that hardly differ, Algorithm 1 compares similarities that are a millionth apart, and fp32 sums of as
many terms are not as good as that. Shapes: B batch, N tokens, D features, M activations or blocks.
"""

import math
from collections.abc import Sequence
from typing import Self, final

import torch
from torch import Tensor

from ppcl_toolkit.statistics.products import full_precision

_BANDS, _LEAST_ROWS = 8, 256
"""A Gram matrix is symmetric: made in 8 bands of rows up to the diagonal, it costs 56 % of the whole."""
_SLAB = 2**26
"""Entries of the Gram matrices that a heatmap has in memory at a time: 256 MB."""


def centred(features_BND: Tensor) -> Tensor:
    """Return features with no mean over tokens and a Frobenius norm of one per sample, in fp32 at least.

    One factor per sample is nothing that CKA sees, but keeps huge activations in range. (Scaling features one by one
    would change CKA.) Features that are equal in all tokens give zeros.
    """
    x = features_BND.detach().to(torch.promote_types(features_BND.dtype, torch.float32))
    without_mean = x - x.mean(dim=1, keepdim=True)
    norm = _norm(without_mean)
    # What is left of equal tokens is rounding, of the order of eps * |x|: not a direction to compare.
    varies = norm > 8 * torch.finfo(x.dtype).eps * _norm(x)
    return torch.where(varies, without_mean / _at_least_tiny(norm), 0.0)


def fewest_rows(x_BND: Tensor) -> Tensor:
    """Return rows [B, min(N, D), D] with the same X^T X: R of X = Q R where there are more tokens than features.

    Q turns the tokens of both sides of a comparison alike, which CKA does not see: <Q K Q^T, Q L Q^T> = <K, L>. Unlike
    a covariance, R keeps what is small in X: it is as exact as X itself.
    """
    return torch.linalg.qr(x_BND, mode="r").R if x_BND.shape[1] > x_BND.shape[2] else x_BND


def rescaled(x_BND: Tensor) -> Tensor:
    """Return features with a norm of one per sample: long chains may grow."""
    return x_BND / _at_least_tiny(_norm(x_BND))


@final
class Gram:
    """K = X X^T of each sample's features, as far as its diagonal."""

    def __init__(self, bands: list[Tensor]) -> None:
        self._bands = bands
        self._norm_B = self.inner(self).sqrt()

    @classmethod
    def of(cls, x_BND: Tensor) -> Self:
        """Multiply out; the caller sees to `full_precision`."""
        tokens = x_BND.shape[1]
        size = max(_LEAST_ROWS, math.ceil(tokens / _BANDS))
        ends = range(size, tokens + size, size)
        return cls([x_BND[:, end - size : end] @ x_BND[:, :end].mT for end in ends])

    def inner(self, other: Self) -> Tensor:
        """Return <K, L> = tr(K L), the sum of the products of all entries, [B] in fp64."""
        return torch.stack([_inner(*bands) for bands in zip(self._bands, other._bands, strict=True)]).sum(0)

    def similarity(self, other: Self) -> Tensor:
        """Return CKA per sample, [B] in fp64 from 0 to 1; 0 where one side does not vary over its tokens.

        Factors of HSIC that depend on the number of tokens cancel.
        """
        return self.inner(other) / _at_least_tiny(self._norm_B * other._norm_B)


@torch.no_grad()
def cka(x_BND: Tensor, y_BND: Tensor) -> Tensor:
    """Return the linear CKA of each sample, [B] in fp64; 0 where one side does not vary over its tokens.

    Invariant to orthogonal maps of either side's features, to their scale and to a shift; not to linear maps at large.
    """
    with full_precision(x_BND.device):
        x, y = centred(x_BND), centred(y_BND)
        return _hsic(x, y) / _at_least_tiny((_hsic(x, x) * _hsic(y, y)).sqrt())


@torch.no_grad()
def heatmap(activations: Sequence[Tensor]) -> Tensor:
    """Return the CKA of all pairs of M activations [B, N, D], averaged over B: [M, M] (Fig. 5)."""
    samples = [[activation[b] for activation in activations] for b in range(len(activations[0]))]
    return torch.stack([similarities(sample) for sample in samples]).mean(0)


@torch.no_grad()
def similarities(activations: Sequence[Tensor]) -> Tensor:
    """Return the CKA of all pairs of one sample's M activations [N, D]: [M, M] in fp64.

    Every Gram matrix is made once, a slab of tokens at a time: M products instead of M^2 / 2.
    """
    tokens, device = len(activations[0]), activations[0].device
    hsic_MM = torch.zeros(len(activations), len(activations), dtype=torch.float64, device=device)
    slab = max(1, _SLAB // (tokens * len(activations)))
    with full_precision(device):
        for start in range(0, tokens, slab):
            kernels = [_rows(activation, slice(start, start + slab)) for activation in activations]
            rows_SMN = torch.stack(kernels, dim=1)
            hsic_MM += (rows_SMN @ rows_SMN.mT).sum(dim=0, dtype=torch.float64)
    root_M = hsic_MM.diagonal().sqrt()
    return hsic_MM / _at_least_tiny(root_M[:, None] * root_M)


def _hsic(x_BND: Tensor, y_BND: Tensor) -> Tensor:
    """<X X^T, Y Y^T> = |X^T Y|_F^2 per sample, by the smaller matrices."""
    assert x_BND.shape[:2] == y_BND.shape[:2], "features of different tokens"
    if x_BND.shape[1] <= x_BND.shape[2]:
        products = (x_BND @ x_BND.mT) * (y_BND @ y_BND.mT)
    else:
        products = (x_BND.mT @ y_BND).square()
    return products.sum(dim=(1, 2), dtype=torch.float64)


def _inner(band: Tensor, other: Tensor) -> Tensor:
    """Sum of the products of a band [B, rows, columns], which ends with the diagonal, and of its mirror image: [B]."""
    products = band * other
    below = products.shape[2] - products.shape[1]
    total = products.sum(dim=(1, 2), dtype=torch.float64)
    return total + products[:, :, :below].sum(dim=(1, 2), dtype=torch.float64) if below else total


def _rows(activation_ND: Tensor, rows: slice) -> Tensor:
    x_ND = centred(activation_ND[None])[0]
    return x_ND[rows] @ x_ND.T


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).to(x.dtype)


def _at_least_tiny(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
