"""Similarities of a whole stack while batches pass its blocks: chains of probes (Eq. 3) and pairs of outputs (Fig. 5).

Shapes: B batch, N tokens, D features, M blocks of a stack.
"""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ppcl_toolkit.statistics.cka import Gram, centred, fewest_rows, rescaled, similarities
from ppcl_toolkit.statistics.products import full_precision

_TOGETHER = 16
"""Samples whose chains share one visit of the probes, which may come to the device for it: 1 GB at D = 3072."""
_HELD = 8 * 2**30
"""Bytes of outputs that a heatmap may keep: 60 blocks with D = 3072 leave 1.5 GB of 4096 tokens in bf16."""


@final
class ChainedCka:
    """Sums cka(u, k) of one stream over samples (Eq. 3).

    A chain needs only block u's output X and the probes behind u, so it is followed to the end of the stack at once,
    and nothing stays behind: with n = min(N, D), X is reduced to n rows that have the same X^T X, which go on by
    x <- x + W x. Per sample and pair (u, k) this takes 2 n D^2 operations for the chain and 1.1 n^2 D for its Gram
    matrix: 3.1 D^3 where N > D, and 2 D^3 to reduce each X. (A product of 2 D^3 per pair would do for tr(C G C G) with
    C = X^T X, G = A^T A and A = (I + W_k) ... (I + W_{u+1}), but that squares the condition of both: in fp32 it finds
    no more than three digits where some features are a hundred times smaller than others.)
    """

    def __init__(self, weights: Sequence[Tensor | None], batches: int = 1, size: int = 1) -> None:
        """`weights` are W [D, D] by block; the first needs none, and a stream may end before the stack does.

        Sums are kept apart for each of `batches` and each of its samples, so that others may be drawn of them; samples
        beyond `size` share a sum.
        """
        self._weights = weights
        self._sums = torch.zeros(batches, size, len(weights), len(weights), dtype=torch.float64)
        self._samples = torch.zeros(batches, size, len(weights), dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Gram]] = []
        self._rows: list[tuple[int, int]] = []
        """Batch and place of each sample that waits."""

    @torch.no_grad()
    def observe(self, block: int, output_BND: Tensor, batch: int = 0) -> None:
        """Take a block's output of the batch of that number; `follow` is called before another block's."""
        assert block == 0 or self._weights[block] is not None, f"block {block} has no probe"
        with full_precision(output_BND.device):
            rows_BND = fewest_rows(centred(output_BND))
            self._waiting.append((rows_BND, Gram.of(rows_BND)))
        rows = [(batch, min(place, self._sums.shape[1] - 1)) for place in range(len(output_BND))]
        for row in rows:
            self._samples[*row, block] += 1
        self._rows += rows
        if sum(len(rows_BND) for rows_BND, _ in self._waiting) >= _TOGETHER:
            self.follow(block)

    @torch.no_grad()
    def follow(self, block: int) -> None:
        """Follow all chains that start at the outputs observed."""
        if self._waiting:
            totals: list[Tensor] = []
            with full_precision(self._waiting[0][0].device):
                for weight_DD in self._weights[block + 1 :]:
                    if weight_DD is not None:
                        totals.append(self._step(weight_DD))
            self._waiting.clear()
            self._add(block, totals)
            self._rows.clear()

    def _step(self, weight_DD: Tensor) -> Tensor:
        """Take all chains past one probe; return their similarities to their starts, sample by sample."""
        weight_DD = weight_DD.to(self._waiting[0][0])
        found = []
        for number, (rows_BND, start) in enumerate(self._waiting):
            next_BND = rescaled(rows_BND + rows_BND @ weight_DD.T)
            self._waiting[number] = next_BND, start
            found.append(start.similarity(Gram.of(next_BND)))
        return torch.cat(found)

    def _add(self, block: int, totals: list[Tensor]) -> None:
        present = [k for k in range(block + 1, len(self._weights)) if self._weights[k] is not None]
        if totals:
            for row, by_block in zip(self._rows, torch.stack(totals).cpu().unbind(1), strict=True):
                self._sums[*row, block, present] += by_block

    def state(self) -> dict[str, Tensor]:
        """Return all sums."""
        assert not self._waiting, "chains wait to be followed"
        return {"sums": self._sums, "samples": self._samples}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, or from such sums of several added up."""
        self._sums, self._samples = tensors["sums"], tensors["samples"]

    @property
    def samples(self) -> int:
        """How many samples were observed."""
        return int(self._samples.sum((0, 1)).max())

    def means(self, drawn: Tensor | slice = slice(None)) -> Tensor:
        """Return cka(u, k), [M, M]: the upper triangle, 1 on the diagonal; NaN for blocks that were never observed.

        `drawn` are numbers of batches, with repetitions, or a mask of samples, [batches, size]; all by default.
        """
        assert not self._waiting, "chains wait to be followed"
        table, count = self._sums[drawn], self._samples[drawn]
        sums, samples = table.flatten(0, -3).sum(0), count.flatten(0, -2).sum(0)
        table = sums / samples[:, None]
        table[:, samples == 0] = torch.nan
        return table.triu(1) + torch.eye(len(table), dtype=table.dtype)


@final
class Heatmap:
    """Sums the CKA of the outputs of any two blocks over samples (Fig. 5).

    Pairs need the outputs of all blocks, which wait on the CPU as they are. Of long streams they are too many: only
    as many of the first samples count as `_HELD` has room for, in whole batches.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._sums = torch.zeros(depth, depth, dtype=torch.float64)
        self._samples = torch.zeros(depth, depth, dtype=torch.float64)
        self._passing: dict[int, dict[int, Tensor]] = {}

    def observe(self, batch: int, block: int, output_BND: Tensor) -> None:
        """Keep a block's output of the batch of that number, if it is one of the first."""
        if batch * output_BND.nbytes * self.depth < _HELD:
            self._passing.setdefault(batch, {})[block] = output_BND.detach().cpu()

    def close(self, batch: int, device: torch.device) -> None:
        """Compare all outputs of a batch that has left the stack, on `device`, sample by sample, and forget them."""
        outputs = self._passing.pop(batch, {})
        blocks = torch.tensor(list(outputs), dtype=torch.long)
        for sample in zip(*outputs.values(), strict=True):
            # NaN has no place in a sum: blocks that were not observed are not added to.
            self._sums[blocks[:, None], blocks] += similarities([output.to(device) for output in sample]).cpu()
            self._samples[blocks[:, None], blocks] += 1

    def state(self) -> dict[str, Tensor]:
        """Return all sums."""
        assert not self._passing, "a batch is still on its way"
        return {"sums": self._sums, "samples": self._samples}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, or from such sums of several added up."""
        self._sums, self._samples = tensors["sums"], tensors["samples"]

    @property
    def samples(self) -> int:
        """How many samples were compared."""
        return int(self._samples.max())

    def means(self) -> Tensor:
        """Return the symmetric table [M, M], 1 on the diagonal; NaN for blocks that were never observed."""
        assert not self._passing, "a batch is still on its way"
        table = self._sums / self._samples
        table.diagonal()[:] = 1.0
        return table
