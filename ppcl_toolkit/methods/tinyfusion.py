"""TinyFusion (arXiv 2412.01199): which blocks stay is learned together with an update of the weights.

- Its rule (Sec. 3.2): blocks in local groups, of each N of M stay; a categorical over the C(M, N) masks of a group,
  drawn by the Gumbel trick and passed straight through; x_{i+1} = m_i T_i(x_i) + (1 - m_i) x_i. Temperature 4 to .1,
  logits from N(0, .02) times 100, and the most likely mask at the end, from its code (VainF/TinyFusion at a147de7, of
  which nothing is taken over: its licence is non-commercial).
- Readings: the joint update is of all weights (their ablation: 35.8 to LoRA's 33.4), and is thrown away as theirs;
  the loss of the search is the velocity; one mask a step; groups of four, in each stack alike; the search has a
  quarter of the budget, and its logits learn ten times as fast as in their 10k steps.
- Its recovery, masked RepKD, is .9 output, .1 task, and features whose weight falls from .01 to 0. Reading: the
  velocity, and features at the ends of intervals at the mean of that weight, relative to the target's energy, without
  the mask of two deviations (which is there against features of large norm, as is this).
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Unreachable, Whole
from ppcl_toolkit.rules.picking import without
from ppcl_toolkit.running.capture import Streams, bind, pack, predict, rerouted, unpack

_GROUP, _SHARE, _SCALE, _RATE = 4, 0.25, 100.0, 1e-2
_HOT, _COLD = 4.0, 0.1


def kept_counts(ground: Ground) -> dict[str, int]:
    """Return how many blocks stay in each stack: the counts of a matched size whose shares are most alike."""
    costs = {stack: ground.cost((stack, 0)) for stack in ground.plan.depths}
    found = []
    for gone in itertools.product(*(range(depth) for depth in ground.plan.depths.values())):
        size = ground.whole - sum(n * costs[stack] for n, stack in zip(gone, costs, strict=True))
        shares = [n / depth for n, depth in zip(gone, ground.plan.depths.values(), strict=True)]
        found.append((abs(ground.window.off(size)), max(shares) - min(shares), gone))
    best = min(found)[2]
    return {stack: depth - n for n, (stack, depth) in zip(best, ground.plan.depths.items(), strict=True)}


def groups_of(depth: int, kept: int) -> list[tuple[range, int]]:
    """Split a stack into local groups, each with how many of it stay: as evenly as whole blocks allow."""
    count = -(-depth // _GROUP)
    edges = [depth * number // count for number in range(count + 1)]
    marks = [round(kept * edge / depth) for edge in edges]
    spans = zip(itertools.pairwise(edges), itertools.pairwise(marks), strict=True)
    return [(range(first, end), after - before) for (first, end), (before, after) in spans]


class Gates(nn.Module):
    """A categorical over the masks of each group."""

    def __init__(self, groups: Sequence[tuple[range, int]], generator: torch.Generator) -> None:
        super().__init__()
        self.groups = groups
        self.masks = [_masks(len(blocks), kept) for blocks, kept in groups]
        self.logits = nn.ParameterList(0.02 * torch.randn(len(m), generator=generator) for m in self.masks)

    def forward(self, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw a mask of all blocks, 0 or 1 each, whose gradient is that of its relaxation."""
        drawn = []
        for logits, masks in zip(self.logits, self.masks, strict=True):
            gumbel = -torch.log(-torch.log(torch.rand(len(logits), generator=generator).clamp(1e-9, 1 - 1e-9)))
            soft = torch.softmax((_SCALE * logits + gumbel) / temperature, 0)
            hard = functional.one_hot(soft.argmax(), len(soft)).to(soft)
            drawn.append((hard - soft.detach() + soft) @ masks)
        return torch.cat(drawn)

    def dropped(self) -> list[int]:
        """Return the blocks that the most likely masks leave out."""
        pairs = zip(self.groups, self.masks, self.logits, strict=True)
        return [
            block
            for (blocks, _), masks, logits in pairs
            for block, stays in zip(blocks, masks[int(logits.argmax())], strict=True)
            if not stays
        ]


def _masks(size: int, kept: int) -> Tensor:
    rows = [[float(index in chosen) for index in range(size)] for chosen in itertools.combinations(range(size), kept)]
    return torch.tensor(rows)


def _pick(ground: Ground, desk: Desk) -> Pick:
    job, blocks = ground.job.finetune, len(ground.places)
    cost = job.batch * 4 * blocks  # the teacher, and every block of the gated model forward and backward
    steps = int(_SHARE * ground.passes / cost)
    if steps < 1:
        raise Unreachable(f"passes: a step of tinyfusion's search takes {cost:,} of {ground.passes:,}")
    generator = torch.Generator().manual_seed(ground.seed)
    counts = kept_counts(ground)
    gates = {s: Gates(groups_of(depth, counts[s]), generator) for s, depth in ground.plan.depths.items()}
    model = copy.deepcopy(ground.runner.transformer).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for own in gates.values() for p in own.parameters()], "lr": _RATE},
            {"params": model.parameters(), "lr": job.learning_rate / 10},
        ],
        weight_decay=0.0,
    )
    batches = ground.batches("search", job.batch)
    for step in range(steps):
        temperature = _HOT + (_COLD - _HOT) * step / max(steps - 1, 1)
        batch = ground.runner.placement.bring(batches[step])
        target = ground.runner.velocity(batch)
        masks = {stack: own(temperature, generator) for stack, own in gates.items()}
        loss = functional.mse_loss(_gated(model, ground, masks, batch).float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        desk.progress(step + 1, steps, f"loss {float(loss.detach()):.4g}")
    dropped = [(stack, block) for stack, own in gates.items() for block in own.dropped()]
    return without(ground, dropped, passes=steps * cost)


def _gated(model: nn.Module, ground: Ground, masks: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
    adapter = ground.runner.adapter
    with ExitStack() as patches, torch.enable_grad():
        for stack in adapter.stacks:
            for block, gate in zip(stack.blocks(model), masks[stack.path], strict=True):
                patches.enter_context(rerouted(block, gated(block, stack, gate)))
        return predict(model, adapter, batch)


def gated(block: nn.Module, stack: Stack, gate: Tensor) -> Callable[..., Any]:
    """Return a forward m T(x) + (1 - m) x of a block."""
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = bind(block, stack, args, kwargs)[1]
        made = unpack(stack, own(*args, **kwargs))
        pairs = {n: (getattr(given, n), getattr(made, n)) for n in stack.returns}
        return pack(stack, Streams(**{n: x + gate.to(y) * (y - x) for n, (x, y) in pairs.items()}))

    return forward


METHODS = (Method(name="tinyfusion", source="arXiv 2412.01199, Sec. 3", rule=_pick, whole=Whole(features=0.005)),)
