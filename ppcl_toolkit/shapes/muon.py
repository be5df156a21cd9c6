"""Muon (Jordan et al. 2024) for the blocks' matrices: momentum, orthogonalised, all matrices of a shape at once.

`torch.optim.Muon` does the same one matrix at a time, which for 200 small matrices costs as much as the model.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: (B, rows, columns) with the same singular vectors and singular values near 1."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


@final
class Muon(torch.optim.Optimizer):
    """Muon whose updates have the size of AdamW's, so that one learning rate serves both."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        """Take 2-D `params` only."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix; one whose block was skipped moves by its momentum alone."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients = [m.grad if m.grad is not None else torch.zeros_like(m) for m in matrices]
        momenta = [self.state[m]["momentum"] for m in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        rows, columns = matrices[0].shape
        size = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        updates = orthogonalise(torch.stack(list(ahead)))
        torch._foreach_add_(matrices, list(updates.unbind()), alpha=-size)
