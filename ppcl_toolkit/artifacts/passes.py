"""A pass over batches that several processes share, and that a killed run goes on with.

What is gathered on the way are named parts with tensors: sums, or weights in training.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar, final

import torch
from torch import Tensor

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import load_tree, save_tree
from ppcl_toolkit.errors import PpclError

Batch = TypeVar("Batch")
SECONDS = 300.0
"""Time between states on disk: at full size they are gigabytes, and a short pass needs none."""


class Part(Protocol):
    """What grows batch by batch."""

    def state(self) -> dict[str, Tensor]:
        """Return all there is of it."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""


@final
class Pass:
    """This process's share of the batches `numbers`, and the state of `parts` after those that are done.

    A state that a killed run left in `folder` is continued: the result is the same to the last bit. Whoever writes the
    result removes the states, `state-*.tmp`. With `sliced`, every process takes all batches, for parts of its own, and
    those who have lost the most say where all begin: `ahead` are the batches that the others have taken already.
    """

    def __init__(
        self, name: str, folder: Path, numbers: range, parts: Mapping[str, Part], *, sliced: bool = False
    ) -> None:
        rank, ranks = processes.world()
        self._path = folder / f"state-{name}-{rank}-of-{ranks}.safetensors.tmp"
        self._ranks = 1 if sliced else ranks
        self._all, self._own = numbers, numbers if sliced else numbers[rank::ranks]
        self._parts = parts
        # Who has nothing to make waits for nobody.
        self._done = self._restored() if parts else len(self._own)
        begin = min(map(int, processes.gathered([str(self._done)]))) if sliced else self._done
        self.ahead = self._done - begin

    @property
    def left(self) -> range:
        """Numbers of the batches that are yet to come."""
        return self._own[self._done - self.ahead :]

    def of(self, batches: Callable[[int, int], Iterable[Batch]]) -> Iterator[Batch]:
        """Yield what is left of `batches(start, stop)`."""
        for number in self.left:
            yield from batches(number, number + 1)

    def kept(self, fed: Iterable[int]) -> Iterator[int]:
        """Write a state from time to time while batches pass; `fed` yields how many have passed.

        Yields how many of all batches are done, as far as this process can tell.
        """
        before, saved = self._done, time.monotonic()
        for more in fed:
            self._done = max(before, before - self.ahead + more)
            if time.monotonic() - saved >= SECONDS:
                self.save()
                saved = time.monotonic()
            yield min(self._done * self._ranks, len(self._all))

    def save(self) -> None:
        """Write the state of this moment."""
        states = {name: part.state() for name, part in self._parts.items()}
        save_tree(self._path, {"done": self._done, "parts": states})

    def add_up(self, device: torch.device) -> None:
        """Replace the parts of all processes by their sums; `device` is where this process exchanges tensors."""
        if self._ranks > 1:
            own = {(name, key): t for name, part in self._parts.items() for key, t in part.state().items()}
            # A process without a batch has nothing to say, and must still take part.
            said = processes.gathered([json.dumps([*key, list(total.shape)]) for key, total in own.items()])
            sums: dict[str, dict[str, Tensor]] = {}
            for name, key, shape in map(json.loads, said):
                total = own.get((name, key), torch.zeros(shape, dtype=torch.float64))
                sums.setdefault(name, {})[key] = _summed(total, device)
            for name, tensors in sums.items():
                self._parts[name].load_state(tensors)

    def _restored(self) -> int:
        if not self._path.exists():
            return 0
        saved = load_tree(self._path)
        if not saved["parts"].keys() <= self._parts.keys():
            raise PpclError(f"{self._path} holds other sums than this run makes; delete it")
        for name, tensors in saved["parts"].items():
            # A copy: the file may be replaced while its tensors are maps of it.
            self._parts[name].load_state({key: tensor.clone() for key, tensor in tensors.items()})
        done: int = saved["done"]
        return done


def _summed(total: Tensor, device: torch.device) -> Tensor:
    exchanged = total.to(device, copy=True)
    torch.distributed.all_reduce(exchanged)
    return exchanged.to(total.device)
