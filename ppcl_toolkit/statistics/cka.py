"""Linear centred kernel alignment (CKA): how alike two sets of features are, up to rotation and scale (Appendix 6).

Tokens are the examples, and every sample of a batch is compared on its own.
Shapes: B batch, N tokens, D features, M activations or blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self, final

import torch
from torch import Tensor


class Kernel(NamedTuple):
    """Features made ready for CKA: centred over tokens, and scaled so that HSIC(K, K) = |K|_F^2 = 1."""

    matrix: Tensor
    """Gram matrices K = X X^T, [B, N, N], or the features X themselves, [B, N, D], where those are smaller."""
    is_gram: bool

    @classmethod
    def of(cls, features_BND: Tensor) -> Self:
        """Center, normalise and multiply out, in fp32 at least, with sums in fp64.

        Normalised means divided by their Frobenius norm: one number per sample, which CKA does not see, but which keeps
        huge activations in range. (Scaling features one by one would change CKA.) Features that are equal in all
        tokens give a kernel of zeros.
        """
        x = features_BND.detach().to(torch.promote_types(features_BND.dtype, torch.float32))
        centred = x - x.mean(dim=1, keepdim=True)
        norm = _norm(centred)
        # What is left of equal tokens is rounding, of the order of eps * |x|: not a direction to compare.
        varies = norm > 8 * torch.finfo(x.dtype).eps * _norm(x)
        x = torch.where(varies, centred / norm.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
        is_gram = x.shape[1] <= x.shape[2]
        matrix = x @ x.mT if is_gram else x.mT @ x
        # |X X^T|_F = |X^T X|_F, at least N^-1/2 for an X of unit norm; the clamp only meets kernels of zeros.
        hsic_root = _norm(matrix).clamp(min=torch.finfo(x.dtype).tiny)
        return cls(matrix / hsic_root if is_gram else x / hsic_root.sqrt(), is_gram)

    def similarity(self, other: "Kernel") -> Tensor:
        """Return HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) per sample, [B] in fp64, from 0 to 1.

        Both must come from equally many tokens and features. Up to factors that cancel, HSIC(K, L) is the sum of K * L,
        which is |X^T Y|_F^2.
        """
        assert self.is_gram == other.is_gram, "kernels of different shapes"
        if self.is_gram:
            return (self.matrix * other.matrix).sum(dim=(1, 2), dtype=torch.float64)
        return (self.matrix.mT @ other.matrix).square().sum(dim=(1, 2), dtype=torch.float64)


def cka(x_BND: Tensor, y_BND: Tensor) -> Tensor:
    """Return the linear CKA of each sample, [B] in fp64; 0 where one side does not vary over its tokens.

    Invariant to orthogonal maps of either side's features, to their scale and to a shift; not to linear maps at large.
    """
    return Kernel.of(x_BND).similarity(Kernel.of(y_BND))


def heatmap(activations: Sequence[Tensor]) -> Tensor:
    """Return the CKA of all pairs of M activations [B, N, D], averaged over B: [M, M] (Fig. 5)."""
    kernels = [Kernel.of(activation) for activation in activations]
    return torch.stack([torch.stack([a.similarity(b).mean() for b in kernels]) for a in kernels])


@final
class ChainedCka:
    """Sums one stream's similarities over samples, while batches pass the blocks of a stack in order (Eq. 3)."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._sums = torch.zeros(2, depth, depth, dtype=torch.float64)
        self._samples = torch.zeros(depth, dtype=torch.float64)
        self._passing: dict[int, list[tuple[Kernel, Tensor]]] = {}

    def observe(self, batch: int, block: int, output_BND: Tensor, weight_DD: Tensor | None) -> None:
        """Take the output of a block and its probe (block 0 needs none): one more column of both tables.

        The chain that started at each earlier block u's output goes on by x <- x + W x, and is compared with that
        output. As many outputs and chains as there were blocks are held until `close`.
        """
        started = self._passing.setdefault(batch, [])
        assert len(started) == block, "a batch passes the blocks of a stack in order"
        output_BND = output_BND.detach().float()
        kernel = Kernel.of(output_BND)
        if started:
            assert weight_DD is not None, f"block {block} has no probe"
            weight_DD = weight_DD.to(output_BND)
            started[:] = [(start, x_BND + x_BND @ weight_DD.T) for start, x_BND in started]
            chained = torch.stack([start.similarity(Kernel.of(x_BND)).sum() for start, x_BND in started])
            plain = torch.stack([start.similarity(kernel).sum() for start, _ in started])
            self._sums[:, :block, block] += torch.stack([chained, plain]).cpu()
        self._samples[block] += len(output_BND)
        started.append((kernel, output_BND))

    def close(self, batch: int) -> None:
        """Forget a batch that has left the stack."""
        self._passing.pop(batch, None)

    def means(self) -> Tensor:
        """Return cka(u, k) (upper triangle, Eq. 3) and the symmetric heatmap of outputs (Fig. 5), [2, M, M].

        Blocks that were never observed have NaN, but 1 on the diagonal.
        """
        assert not self._passing, "a batch is still on its way"
        cka, upper = (self._sums / self._samples).triu(1).unbind()
        ones = torch.eye(self.depth, dtype=cka.dtype)
        return torch.stack([cka + ones, upper + upper.T + ones])


def _norm(x: Tensor) -> Tensor:
    # Between blocks that hardly differ, Algorithm 1 compares similarities that are a millionth apart: fp32 sums of as
    # many terms are not as good as that.
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).to(x.dtype)
