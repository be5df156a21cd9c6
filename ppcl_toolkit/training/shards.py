"""Weights and moments that are spread over processes: each writes its own rows, and any number of them reads them.

A weight of n rows is spread over P processes as torch's FSDP2 does it: ceil(n / P) rows each, the last ones fewer.
On disk, `<stem>.json` is written last, by rename, and names what belongs together; the rows of each process lie in
safetensors files beside it. Nothing is gathered, nothing is pickled.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.storage import save_tensors
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.records import FileName, read_record

_FILE_BYTES = 4 * 1024**3
"""Of one file at most, but for a tensor that is larger: so much is on the host at a time."""


def shard(
    modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype, *, prepare: Callable[[nn.Module], None]
) -> None:
    """Spread weights, and with them gradients and moments, over the processes (FSDP2), module by module, in place.

    `modules` are the blocks and, last, what they belong to; `prepare` sees each before. Whole weights, there for a
    block at a time, are in the teacher's `dtype`; gradients are averaged in fp32.
    """
    mesh = init_device_mesh(device.type, (processes.world()[1],))
    half = dtype != torch.float32
    # Inputs stay as they are: rotary embeddings and noise levels are fp32 in the teacher, too.
    policy = MixedPrecisionPolicy(dtype if half else None, torch.float32 if half else None, None, False)
    for each in modules:
        prepare(each)
        fully_shard(each, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(part: Tensor, like: Tensor) -> Tensor:
    """Return a process's part as a tensor that is spread as `like` is; one that has no rows of it as it is."""
    if not isinstance(like, DTensor) or part.shape != like.to_local().shape:
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def own_rows(tensor: Tensor) -> slice:
    """Return which rows of a tensor this process holds."""
    return _share(tensor.shape[0], *processes.world()) if isinstance(tensor, DTensor) else slice(None)


class Part(NamedTuple):
    """What a process holds of a tensor."""

    name: str
    tensor: Tensor
    rows: int | None = None
    """Of the whole tensor; None where every process has it whole."""


def save(folder: Path, stem: str, parts: Iterable[Part], facts: Mapping[str, Any], *, suffix: str = "") -> None:
    """Write this process's `parts`, and, when all have, the index with `facts`; an older set goes.

    All processes call this. What is whole in each is written by the first; facts need a "mark", another for each set.
    """
    rank, ranks = processes.world()
    rows: dict[str, int] = {}
    mark = f"{stem}-{facts['mark']}of{ranks}"
    for number, tensors in enumerate(_batches(parts, rows, everything=rank == 0)):
        save_tensors(folder / f"{mark}-{rank:04d}-{number:03d}.safetensors{suffix}", tensors)
    processes.wait()
    if rank == 0:
        write_json(folder / f"{stem}.json{suffix}", {**facts, "files": mark, "processes": ranks, "rows": rows})
        for path in folder.glob(f"{stem}-*.safetensors{suffix}"):
            if not path.name.startswith(f"{mark}-"):
                path.unlink()


def discard(folder: Path, stem: str, *, suffix: str = "") -> None:
    """Delete a set, its index first."""
    if processes.is_main():
        (folder / f"{stem}.json{suffix}").unlink(missing_ok=True)
        for path in folder.glob(f"{stem}-*.safetensors{suffix}"):
            path.unlink()


class _Index(BaseModel):
    """`<stem>.json`; facts are whatever was given."""

    model_config = ConfigDict(extra="allow")

    files: FileName
    processes: PositiveInt
    rows: dict[str, NonNegativeInt]


@final
class Saved:
    """What `save` wrote, to be read by rows."""

    def __init__(self, folder: Path, stem: str, *, suffix: str = "") -> None:
        self._path = folder / f"{stem}.json{suffix}"
        index: _Index = read_record(self._path, _Index)
        self.facts: dict[str, Any] = index.model_dump()
        self._rows, self._processes = index.rows, index.processes
        try:
            files = sorted(folder.glob(f"{self.facts['files']}-*.safetensors{suffix}"))
            self._files: dict[tuple[int, str], Path] = {}
            self._open: tuple[Path, Any] | None = None
            for path in files:
                with safe_open(path, framework="pt") as file:
                    rank = int(path.name.removeprefix(f"{self.facts['files']}-").partition("-")[0])
                    self._files.update({(rank, name): path for name in file.keys()})  # noqa: SIM118 - not a dict
            # Those of the first process first.
            self.names = list(dict.fromkeys(name for _, name in sorted(self._files)))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._damaged(error) from error

    def has(self, rank: int, name: str) -> bool:
        """Tell whether a process wrote something under a name."""
        return (rank, name) in self._files

    def part(self, rank: int, name: str, rows: slice = slice(None)) -> Tensor:
        """Return what one process wrote under a name, or some rows of that."""
        try:
            file = self._opened(self._files[rank, name])
            found: Tensor = file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]
        except (OSError, KeyError, SafetensorError) as error:
            raise self._damaged(error) from error
        return found

    def _opened(self, path: Path) -> Any:
        """Return a file, whose head is read once: tensors are mostly asked for in their order there."""
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return a tensor, or some of its rows, from the files of those that have them."""
        holders = self.holders(name, rows)
        if len(holders) == 1:
            return self.part(holders[0][0], name, holders[0][1])
        return torch.cat([self.part(rank, name, within) for rank, within in holders])

    def holders(self, name: str, rows: slice = slice(None)) -> list[tuple[int, slice]]:
        """Return who wrote those rows of a tensor, and where they are in what each wrote; all of it is slice(None)."""
        if name not in self._rows:
            return [(0, slice(None))]
        start, stop, _ = rows.indices(self._rows[name])
        found = []
        for rank in range(self._processes):
            has = _share(self._rows[name], rank, self._processes)
            within = slice(max(start, has.start) - has.start, min(stop, has.stop) - has.start)
            if within.start < within.stop:
                found.append((rank, slice(None) if within == slice(0, has.stop - has.start) else within))
        # No rows have a width and a dtype, too.
        return found or [(0, slice(0, 0))]

    def _damaged(self, error: Exception) -> PpclError:
        return PpclError(f"{self._path} or its files are damaged or not of this run ({error}); delete it and run again")


def _share(rows: int, rank: int, ranks: int) -> slice:
    each = -(-rows // ranks)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def _batches(parts: Iterable[Part], rows: dict[str, int], *, everything: bool) -> Iterator[dict[str, Tensor]]:
    """Yield tensors on the host, as many at a time as one file shall hold; note the rows of those that are spread."""
    batch: dict[str, Tensor] = {}
    size = 0
    for part in parts:
        if part.rows is not None:
            rows[part.name] = part.rows
        elif not everything:
            continue
        # A copy: weights can share memory, which the format refuses.
        batch[part.name] = part.tensor.detach().to("cpu", copy=True).contiguous()
        size += batch[part.name].nbytes
        if size >= _FILE_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch
