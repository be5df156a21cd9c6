"""What rivals know of single blocks: how much each changes its streams, and what its removal costs.

Shapes: B batch, N tokens, D features.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.running.capture import Streams, bind, passing, rerouted, unpack
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Batch, Runner
from ppcl_toolkit.statistics.cka import cka

_FILE = "scores.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One number per block, in the order in which they run; a small one says that it may go."""

    samples: int
    influence: list[float]
    """1 - E cos(x, y) over the tokens of all streams, x what comes in and y what goes out."""
    change: list[float]
    """E |y - x|^2 / |x|^2, streams averaged."""
    removal: list[float]
    """E |v - v_without|^2, elements averaged."""
    early: list[float]
    """The same, weighted by the noise level of each sample."""
    sensitivity: list[float]
    """1 - CKA of the last block's image with and without it."""

    @property
    def looked(self) -> int:
        """What a single look at all blocks takes, in b."""
        return self.samples * len(self.change)

    @property
    def removed(self) -> int:
        """What taking them away one by one takes, in b: the teacher, and of each the blocks behind it."""
        blocks = len(self.change)
        return self.samples * (blocks + blocks * (blocks - 1) // 2)

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Read what `score_blocks` wrote."""
        return cls(**json.loads((folder / _FILE).read_text()))


@torch.no_grad()
def score_blocks(runner: Runner, batches: Batches, total: int, desk: Desk) -> None:
    """Measure all blocks over `total` batches, and write `scores.json`."""
    sums: dict[str, list[float]] = {}
    samples, levels = 0, 0.0
    for number, batch in enumerate(batches(0, total), start=1):
        noise = batches.noising.level(batch[runner.adapter.timestep])
        samples, levels = samples + len(noise), levels + float(noise.sum())
        for name, values in _of_batch(runner, batch, noise).items():
            before = sums.setdefault(name, [0.0] * len(values))
            sums[name] = [a + b for a, b in zip(before, values, strict=True)]
        desk.progress(number, total)
    means = {name: [v / (levels if name == "early" else samples) for v in values] for name, values in sums.items()}
    found = Scores(samples=samples, **means)
    (desk.folder / _FILE).write_text(json.dumps(asdict(found), indent=1) + "\n")


def _of_batch(runner: Runner, batch: Batch, noise_B: Tensor) -> dict[str, list[float]]:
    blocks = [(stack, block) for stack in runner.adapter.stacks for block in runner.blocks(stack.path)]
    with _watched(blocks) as passed:
        velocity = runner.velocity(batch)
    last = passed[-1][1].image
    found: dict[str, list[float]] = {n: [] for n in ("influence", "change", "removal", "early", "sensitivity")}
    for (stack, block), (given, made) in zip(blocks, list(passed), strict=True):
        x, y = _pairs(given, made)
        found["influence"].append(float(_turned(x, y).sum()))
        found["change"].append(float(_changed(x, y).sum()))
        with rerouted(block, passing(block, stack)), _watched(blocks[-1:]) as end:
            without = runner.velocity(batch)
        error_B = (without - velocity).float().square().flatten(1).mean(1)
        found["removal"].append(float(error_B.sum()))
        found["early"].append(float((error_B * noise_B.to(error_B)).sum()))
        # Without the last block itself, what went into it comes out.
        image = end[0][1].image if end else given.image
        found["sensitivity"].append(float((1 - cka(last, image)).sum()))
    return found


@contextlib.contextmanager
def _watched(blocks: list[tuple[Stack, nn.Module]]) -> Iterator[list[tuple[Streams, Streams]]]:
    """Collect what blocks are given and what they return, in the order of one call."""
    seen: list[tuple[Streams, Streams]] = []

    def note(stack: Stack) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((bind(block, stack, args, kwargs)[1], unpack(stack, output)))

        return hook

    handles = [block.register_forward_hook(note(stack), with_kwargs=True) for stack, block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _pairs(given: Streams, made: Streams) -> tuple[list[Tensor], list[Tensor]]:
    names = [name for name in ("image", "text") if getattr(given, name) is not None and getattr(made, name) is not None]
    return [getattr(given, name).float() for name in names], [getattr(made, name).float() for name in names]


def _turned(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Return 1 - cos of each sample, [B], averaged over the tokens of all streams."""
    cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(x, y, strict=True)]
    return 1 - torch.cat(cosines, dim=1).mean(1)


def _changed(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Return the relative change of each sample, [B], streams averaged."""
    pairs = zip(x, y, strict=True)
    each = [(b - a).square().sum((1, 2)) / a.square().sum((1, 2)).clamp(min=1e-30) for a, b in pairs]
    return torch.stack(each).mean(0)
