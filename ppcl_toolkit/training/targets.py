"""What a frozen teacher says to seeded batches, computed once: the targets of fine-tuning, on disk by batch number."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.artifacts.record import checked
from ppcl_toolkit.artifacts.storage import load_tree, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, Plan
from ppcl_toolkit.running.capture import Streams, map_tensors, unpack
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.training.loop import autocast

Place = tuple[str, int]
"""A stack's path and a block of it."""


@dataclass(frozen=True, slots=True)
class Target:
    """The teacher's answer to one batch, in the dtype in which it gave it."""

    velocity: Tensor
    features: Mapping[Place, Streams] = field(default_factory=dict)
    """The streams out of the last block of each interval."""

    def to(self, device: torch.device) -> "Target":
        """Return this target on `device`."""
        moved = map_tensors((self.velocity, dict(self.features)), lambda tensor: tensor.to(device))
        return Target(*moved)


class Velocities:
    """Recorded targets by the number of their batch, one file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._check = checked(folder)

    def __getitem__(self, number: int) -> Target:
        """Read the target of a batch; one that is not there or damaged is a `PpclError` that names its file."""
        self._check(self._file(number))
        saved = load_tree(self._file(number))
        features = {_place(name): Streams(**streams) for name, streams in saved["features"].items()}
        return Target(saved["velocity"], features)

    def __contains__(self, number: int) -> bool:
        return self._file(number).exists()

    def add(self, number: int, target: Target) -> None:
        """Write the target of a batch, by rename."""
        features = {f"{stack}:{block}": streams._asdict() for (stack, block), streams in target.features.items()}
        save_tree(self._file(number), {"velocity": target.velocity, "features": features})

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def interval_ends(plans: Iterable[Plan]) -> list[Form]:
    """Return the forms of `plans` that stand for several blocks, each place where one ends once."""
    forms = {(form.stack, form.last): form for plan in plans for form in plan.forms() if form.last > form.first}
    return list(forms.values())


def record(
    runner: Runner, batches: Batches, numbers: Iterable[int], velocities: Velocities, ends: Sequence[Form] = ()
) -> Iterator[int]:
    """Write the teacher's answers to those of `numbers` that are not there yet; yields how many are done.

    Raises `PpclError` before the second is written if all will not fit on the disk.
    """
    wanted = list(numbers)
    missing = [number for number in wanted if number not in velocities]
    done = len(wanted) - len(missing)
    for number in missing:
        target = answer(runner, batches, number, ends)
        if number == missing[0]:
            _check_room(velocities.folder, target, len(missing))
        velocities.add(number, target)
        done += 1
        yield done


def answer(runner: Runner, batches: Batches, number: int, ends: Sequence[Form] = ()) -> Target:
    """Run the teacher on batch `number`, as the student will be run on it."""
    blocks = [(runner.blocks(form.stack)[form.last], runner.adapter.stack(form.stack)) for form in ends]
    device = runner.placement.device
    batch = batches[number]
    with autocast(device, batches.dtype), outputs(blocks) as seen:
        velocity = runner.velocity(batch)
    features = {(form.stack, form.last): streams for form, streams in zip(ends, seen, strict=True)}
    stack = runner.adapter.stacks[-1].path
    end = (stack, len(runner.blocks(stack)) - 1)
    if end in features and not runner.reads_last_text(batch):
        features[end] = Streams(features[end].image)
    return Target(velocity, features)


@contextlib.contextmanager
def outputs(blocks: Sequence[tuple[nn.Module, Stack]]) -> Iterator[list[Streams]]:
    """Collect what blocks return, in the order of `blocks`, of one forward call of their transformer."""
    seen: dict[int, Streams] = {}
    found: list[Streams] = []

    def collector(index: int, stack: Stack) -> Any:
        return lambda _module, _args, output: seen.__setitem__(index, unpack(stack, output))

    handles = [block.register_forward_hook(collector(i, stack)) for i, (block, stack) in enumerate(blocks)]
    try:
        yield found
        found.extend(seen[index] for index in range(len(blocks)))
    finally:
        for handle in handles:
            handle.remove()


def _check_room(folder: Path, first: Target, count: int) -> None:
    tensors = [first.velocity, *(t for streams in first.features.values() for t in streams if t is not None)]
    needed, free = count * sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(folder).free
    if needed > free:
        less = "finetune.features: 0, or fewer finetune.steps" if first.features else "fewer finetune.steps"
        raise PpclError(
            f"the teacher's answers to {count:,} batches take {needed / 1e9:.1f} GB, and {folder} has room for "
            f"{free / 1e9:.1f} GB; choose another --out, {less}"
        )


def _place(name: str) -> Place:
    stack, _, block = name.rpartition(":")
    return stack, int(block)
