"""The processes of one run: which this is, how they wait for each other, and the device that each has."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ppcl_toolkit.errors import PpclError


def pick_device(name: str) -> torch.device:
    """Return the process's device: `auto` is its GPU where there is one. `PpclError` for one that is not there."""
    try:
        wanted = None if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise PpclError(f"device: {name!r} is none; use auto, cpu, cuda or cuda:1") from error
    if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
        raise PpclError(f"device: {name!r} is asked for, and torch finds no GPU; use auto or cpu")
    # While one process records samples or evaluates, the others wait: hours are no failure.
    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
    # Of several processes each has a GPU of its own, whatever number is asked for.
    return state.device if wanted is None or wanted.index is None or state.num_processes > 1 else wanted


def is_main() -> bool:
    """Whether this process writes."""
    return bool(PartialState().is_main_process)


def world() -> tuple[int, int]:
    """Return this process's rank and their number."""
    state = PartialState()
    return int(state.process_index), int(state.num_processes)


def wait() -> None:
    """Wait for the other processes."""
    PartialState().wait_for_everyone()


def gathered(said: Sequence[str]) -> list[str]:
    """Return what all processes say, in their order, without repeats."""
    _, count = world()
    return list(dict.fromkeys(gather_object(list(said)) if count > 1 else said))


def agreed(value: Any) -> Any:
    """Return what the main process says; all ask together."""
    _, count = world()
    return broadcast_object_list([value])[0] if count > 1 else value


def messages_on(device: torch.device) -> torch.device:
    """Return where a tensor must be to be sent to another process: on `device`, or on the host."""
    _, count = world()
    return device if count > 1 and "nccl" in torch.distributed.get_backend_config() else torch.device("cpu")


def average(value: Tensor) -> float:
    """Average a scalar over the processes."""
    _, count = world()
    if count > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
    return float(value) / count
