"""A training on disk, to go on bit by bit, on as many processes as wrote it or on another number of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.lowbit import joined, packed, unpacked
from ppcl_toolkit.training.optimizers import State
from ppcl_toolkit.training.shards import Part, Saved, discard, local, own_rows, save

_STATE, _WEIGHTS = "state", "transformer"
_SUFFIX = ".tmp"
"""Of a state: it goes when the training is done."""


def save_training(folder: Path, module: nn.Module, optimization: Optimization) -> None:
    """Write a module in training and its optimization; all processes call this."""
    facts = {**optimization.account(), "mark": f"{optimization.done:08d}", "optimizer": optimization.optimizer}
    save(folder, _STATE, _everything(module, optimization), facts, suffix=_SUFFIX)


def load_training(folder: Path, module: nn.Module, optimization: Optimization) -> None:
    """Go on from what `save_training` wrote, where there is such a thing; another optimizer's is a `PpclError`."""
    if not steps_done(folder):
        return
    saved = Saved(folder, _STATE, suffix=_SUFFIX)
    if saved.facts["optimizer"] != optimization.optimizer:
        raise PpclError(
            f"{folder} was trained with optimizer {saved.facts['optimizer']}, and {optimization.optimizer} is chosen "
            f"here; set optimizer: {saved.facts['optimizer']}, or delete the folder"
        )
    with torch.no_grad():
        for name, value in _values(module):
            local(value).copy_(saved.read(f"weights/{name}", own_rows(value)))
    entries = _entries(saved)
    states = {i: _moments(saved, entries.get(name, {}), p) for i, (name, p) in enumerate(_trained(module))}
    optimization.load_state({**saved.facts, "moments": states})


def steps_done(folder: Path) -> int:
    """Return how many steps the state in `folder` has; 0 where there is none."""
    there = (folder / f"{_STATE}.json{_SUFFIX}").exists()
    return int(Saved(folder, _STATE, suffix=_SUFFIX).facts["done"]) if there else 0


def save_result(folder: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """Write what a module has become, and forget its state; all processes call this."""
    parts = (Part(name, local(value).to(dtype), _rows(value)) for name, value in _values(module))
    save(folder, _WEIGHTS, parts, {"mark": "final"})
    discard(folder, _STATE, suffix=_SUFFIX)


def load_result(folder: Path) -> dict[str, Tensor]:
    """Read the state dict that `save_result` wrote."""
    saved = Saved(folder, _WEIGHTS)
    return {name: saved.read(name) for name in saved.names}


def _everything(module: nn.Module, optimization: Optimization) -> Iterator[Part]:
    for name, value in _values(module):
        yield Part(f"weights/{name}", local(value), _rows(value))
    for index, (name, parameter) in enumerate(_trained(module)):
        for key, moment in optimization.rule.state(index).items():
            moment = local(moment if isinstance(moment, Tensor) else torch.tensor(moment))
            # What has another shape is no share of rows: a count of steps.
            rows = _rows(parameter) if moment.shape == local(parameter).shape else None
            for kind, tensor in packed(moment).items():
                yield Part(f"moments/{name}/{key}{kind}", tensor, rows)


def _entries(saved: Saved) -> dict[str, dict[str, str]]:
    """Return where the moments of each parameter are, by their keys; an 8-bit moment is where its codes are."""
    found: dict[str, dict[str, str]] = {}
    for entry in saved.names:
        name, _, own = entry.removeprefix("moments/").rpartition("/")
        if entry.startswith("moments/") and own.partition(".")[2] in ("", "codes"):
            found.setdefault(name, {})[own.partition(".")[0]] = entry
    return found


def _moments(saved: Saved, entries: Mapping[str, str], parameter: Tensor) -> State:
    state: State = {}
    for key, entry in sorted(entries.items()):
        # Who has which rows is the same for the tensors of an 8-bit moment.
        holders = saved.holders(entry, own_rows(parameter))
        pieces = [_piece(saved, rank, entry.removesuffix(".codes")) for rank, _ in holders]
        whole = len(pieces) == 1 and holders[0][1] == slice(None)
        moment = pieces[0] if whole else joined(pieces, [rows for _, rows in holders])
        state[key] = int(moment) if moment.dtype == torch.int64 else moment
    return state


def _piece(saved: Saved, rank: int, entry: str) -> Tensor:
    kinds = ("", ".codes", ".scale", ".signed", ".unsigned")
    return unpacked({kind: saved.part(rank, entry + kind) for kind in kinds if saved.has(rank, entry + kind)})


def _values(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _rows(tensor: Tensor) -> int | None:
    return tensor.shape[0] if isinstance(tensor, DTensor) else None
