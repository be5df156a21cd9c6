"""Linear probes: one residual linear map per block and stream, fitted to the teacher's block (Sec. 3.2, Eq. 1 and 2).

Shapes: B batch, N tokens, D features.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.artifacts.passes import Pass
from ppcl_toolkit.artifacts.storage import Desk, save_tensors
from ppcl_toolkit.recipe import Probe
from ppcl_toolkit.records import parse_record, reading
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.running.passage import Ahead
from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.running.schedule import Batch, Reading, Runner
from ppcl_toolkit.statistics.moments import Moments

Key = tuple[str, int, str]
"""Stack path, block, stream."""
_FILE, _PART = "probes.safetensors", "part-{}.safetensors"


@final
@dataclass(frozen=True, slots=True)
class Probes:
    """What `fit_probes` found, by stack path, block and stream."""

    weights: Mapping[Key, Tensor]
    """W [D, D] of l(x) = x + W x, fp32 on the CPU."""
    unexplained: Mapping[Key, float]
    """Share of the update's energy, |T(x) - x|^2, that W leaves on the tokens of Eq. 1: 0 perfect, 1 useless."""

    def save(self, folder: Path, name: str = _FILE) -> None:
        """Write `probes.safetensors`; the unexplained shares are in its header."""
        shares = {_join(key): share for key, share in self.unexplained.items()}
        tensors = {_join(key): weight.contiguous() for key, weight in self.weights.items()}
        save_tensors(folder / name, tensors, {"unexplained": json.dumps(shares)})

    @classmethod
    def load(cls, folder: Path, name: str = _FILE) -> Self:
        """Read what `save` wrote."""
        with reading(folder / name), safe_open(folder / name, framework="pt") as file:
            shares = parse_record(file.metadata()["unexplained"], dict[str, float], f"{folder / name}, unexplained,")
            weights = {_split(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return cls(weights, {_split(name): share for name, share in shares.items()})


@final
class ProbeReader:
    """Sums up the normal equations of one block, a set per stream."""

    def __init__(self, stack: Stack, block: int) -> None:
        self.stack = stack
        self.first = self.last = block
        self.reference: tuple[int, int] | None = None
        # On the host unless placed: 150 MB per block and stream at 3072 features, more than a device has to spare.
        self.moments: dict[str, Moments] = {}

    def read(self, reading: Reading) -> None:
        """Add one batch's tokens."""
        for stream, (x_BND, y_BND) in _pairs(reading).items():
            if stream not in self.moments:
                self.moments[stream] = Moments.zeros(x_BND.shape[-1])
            self.moments[stream].add(x_BND, y_BND)

    def place(self, device: torch.device) -> None:
        """Move the sums."""
        self.moments = {stream: moments.to(device) for stream, moments in self.moments.items()}

    def state(self) -> dict[str, Tensor]:
        """Return all sums."""
        return {
            f"{stream}.{name}": total for stream, sums in self.moments.items() for name, total in sums.tensors().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        by_stream: dict[str, dict[str, Tensor]] = {}
        for key, total in tensors.items():
            stream, name = key.split(".")
            by_stream.setdefault(stream, {})[name] = total
        self.moments = {stream: Moments.from_tensors(sums) for stream, sums in by_stream.items()}


@final
class ProbeTrainer:
    """Trains the probes of one block on Eq. 2, one AdamW step per reading, with the optimizer of Sec. 4.1.

    Weights and the optimizer's averages are on the device during a visit, or a reading, and otherwise on the host:
    those of all blocks would take three times as much as their weights.
    """

    def __init__(self, stack: Stack, block: int, weights: Mapping[str, Tensor], learning_rate: float) -> None:
        self.stack = stack
        self.first = self.last = block
        self.reference: tuple[int, int] | None = None
        self.weights = {stream: nn.Parameter(weight.clone()) for stream, weight in weights.items()}
        self._visited = False
        self._optimizer = torch.optim.AdamW(
            self.weights.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.02
        )

    def read(self, reading: Reading) -> None:
        """Make one step on one batch: each stream's squared error, summed over features, averaged over tokens."""
        if not self._visited:
            self._move(reading.target.image.device)
        with torch.enable_grad():
            losses = []
            for stream, (x_BND, y_BND) in _pairs(reading).items():
                x, update = x_BND.float(), y_BND.float() - x_BND.float()
                losses.append((x @ self.weights[stream].T - update).square().sum(-1).mean())
            torch.stack(losses).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if not self._visited:
            self._move(HOST)

    def place(self, device: torch.device) -> None:
        """Move the weights and the optimizer's averages, for all readings of a visit."""
        self._visited = True
        self._move(device)

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the optimizer's averages and step counters."""
        found = {}
        for stream, weight in self.weights.items():
            found[f"{stream}.weight"] = weight.detach()
            found.update({f"{stream}.{name}": value for name, value in self._optimizer.state[weight].items()})
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for stream, weight in self.weights.items():
            own = {key.split(".")[1]: value for key, value in tensors.items() if key.split(".")[0] == stream}
            weight.data = own.pop("weight")
            self._optimizer.state[weight] = own

    def _move(self, device: torch.device) -> None:
        for weight in self.weights.values():
            weight.data = weight.data.to(device)
            state = self._optimizer.state[weight]
            # Step counters are scalars and belong on the CPU.
            state.update({name: value.to(device) for name, value in state.items() if value.ndim})


def probe(runner: Runner, batches: Callable[[int, int], Iterable[Batch]], section: Probe, desk: Desk) -> None:
    """Run the stage: fit all probes, and write them.

    Several processes share out the teacher: each has a slice of its blocks, and the sums and probes of those.
    """
    rank, ranks = processes.world()
    own = fit_probes(runner, batches, section, desk)
    if rank > 0:
        own.save(desk.folder, _PART.format(rank))
    processes.wait()
    if rank == 0:
        # Slices are in forward order, as processes are.
        parts = [own, *(Probes.load(desk.folder, _PART.format(other)) for other in range(1, ranks))]
        weights = {key: weight for part in parts for key, weight in part.weights.items()}
        Probes(weights, {key: share for part in parts for key, share in part.unexplained.items()}).save(desk.folder)
        for leftover in [*desk.folder.glob("state-*.tmp"), *desk.folder.glob(_PART.format("*"))]:
            leftover.unlink()


def fit_probes(runner: Runner, batches: Callable[[int, int], Iterable[Batch]], settings: Probe, desk: Desk) -> Probes:
    """Fit a probe to every block and stream that this process has (Eq. 1); `settings.steps` trains them (Eq. 2).

    `batches(start, stop)` yields the batches of those numbers; training goes on with some that Eq. 1 has not seen. What
    a killed run left on the desk is continued. Raises `PpclError` where the tokens are too few.
    """
    stacks, example = runner.adapter.stacks, next(iter(batches(0, 1)))
    everywhere = [ProbeReader(stack, block) for stack in stacks for block in range(len(runner.blocks(stack.path)))]
    runner = runner.pipelined(everywhere, example)
    readers = [reader for reader in everywhere if runner.has(reader)]
    total = settings.batches + settings.steps
    sums = Pass("sums", desk.folder, range(settings.batches), _named(readers), sliced=True)
    for done in sums.kept(runner.feed(sums.of(batches), [Ahead(reader, sums.ahead) for reader in readers])):
        desk.progress(done, total)
    if settings.steps:
        # Training may be killed, too.
        sums.save()
    moments = {(r.stack.path, r.first, stream): found for r in readers for stream, found in r.moments.items()}
    weights = {key: found.solve(settings.ridge).float() for key, found in moments.items()}
    if settings.steps:
        trainers = [ProbeTrainer(r.stack, r.first, _of(weights, r), settings.learning_rate) for r in readers]
        training = Pass("training", desk.folder, range(settings.batches, total), _named(trainers), sliced=True)
        fed = runner.feed(training.of(batches), [Ahead(trainer, training.ahead) for trainer in trainers])
        for done in training.kept(fed):
            desk.progress(settings.batches + done, total)
        weights = {(t.stack.path, t.first, name): w.detach() for t in trainers for name, w in t.weights.items()}
    return Probes(weights, {key: moments[key].unexplained(weight) for key, weight in weights.items()})


def _named(readers: Sequence[Any]) -> dict[str, Any]:
    return {f"{reader.stack.path}.{reader.first}": reader for reader in readers}


def _pairs(reading: Reading) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each stream that a block both takes and returns, [B, N, D]; [T, D] where it is padded."""
    pairs = zip(Streams._fields, reading.own(reading.inputs), reading.own(reading.target), strict=True)
    return {
        stream: (reading.tokens(stream, x), reading.tokens(stream, y))
        for stream, x, y in pairs
        if x is not None and y is not None
    }


def _of(weights: Mapping[Key, Tensor], reader: ProbeReader) -> dict[str, Tensor]:
    return {stream: weights[reader.stack.path, reader.first, stream] for stream in reader.moments}


def _join(key: Key) -> str:
    return ".".join(map(str, key))


def _split(name: str) -> Key:
    path, block, stream = name.rsplit(".", 2)
    return path, int(block), stream
