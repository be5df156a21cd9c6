"""From similarities to intervals and runs: Eq. 4 and 5, Algorithm 1, and what stands beside it.

Block numbers are 0-based and inclusive; the paper counts from 1. Shapes: M blocks of a stack; a table [M, M] holds
cka(u, k) in row u, column k.
"""

import torch
from torch import Tensor

Span = tuple[int, int]
"""First and last block."""


def differences(cka: Tensor) -> Tensor:
    """Eq. 4: delta(u, k) = -(cka(u, k) - cka(u, k - 1)) for k > u, zero elsewhere; [M, M] -> [M, M]."""
    delta = torch.zeros_like(cka)
    delta[:, 1:] = -(cka[:, 1:] - cka[:, :-1])
    return delta.triu(1)


def trend_intervals(delta: Tensor, first_block: int = 0) -> list[Span]:
    """Algorithm 1, stage 1.2: the interval that starts at u ends before the first k where delta(u, k) rises.

    Without a rise it ends with the stack. Intervals cover every block from `first_block` on; one may be a single block.
    """
    depth = len(delta)
    intervals = []
    u = first_block
    while u < depth:
        v = depth - 1
        for k in range(u + 2, depth):
            if delta[u, k] > delta[u, k - 1]:
                v = k - 1
                break
        intervals.append((u, v))
        u = v + 1
    return intervals


def threshold_intervals(cka: Tensor, threshold: float, first_block: int = 0) -> list[Span]:
    """LP-a of the paper's ablation: an interval ends at the last k with cka(u, k) >= `threshold`."""
    depth = len(cka)
    intervals = []
    u = first_block
    while u < depth:
        v = max([k for k in range(u + 1, depth) if cka[u, k] >= threshold], default=u)
        intervals.append((u, v))
        u = v + 1
    return intervals


def text_runs(heatmap: Tensor, threshold: float = 0.999) -> list[Span]:
    """Maximal runs [reference, last] whose blocks all have CKA >= `threshold` with the reference (Appendix 6).

    Runs are disjoint and come deepest first; each reaches as far up as it can.
    """
    runs = []
    last = len(heatmap) - 1
    while last > 0:
        alike = (r for r in range(last) if bool((heatmap[r, r + 1 : last + 1] >= threshold).all()))
        reference = next(alike, last)
        if reference < last:
            runs.append((reference, last))
        last = reference - 1
    return runs
