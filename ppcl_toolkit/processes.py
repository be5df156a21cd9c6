"""The processes of one run: which this is, how they wait for each other, and the device that each has.

However long processes wait, one that dies ends the run at once (`watch`). One that lives and does nothing ends it, too:
an exchange of tensors after half an hour, a wait after two hours without a word of progress.
"""

import contextlib
import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed

from ppcl_toolkit import ties
from ppcl_toolkit.errors import PpclError

EXCHANGE = timedelta(minutes=30)
"""Longest exchange of tensors: processes come to one at about the same time."""
SILENCE = 2 * 3600.0
"""Seconds after which a process that others wait for and that tells no progress hangs."""
_LOOK = 10.0
"""Seconds between two looks at whom a process waits for, and at how far they are; and until a file is seen by all."""
_waits = itertools.count()
_told = 0.0
_apart = False


def pick_device(name: str) -> torch.device:
    """Return the process's device: `auto` is its GPU where there is one. `PpclError` for one that is not there."""
    try:
        wanted = None if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise PpclError(f"device: {name!r} is none; use auto, cpu, cuda or cuda:1") from error
    if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
        raise PpclError(f"device: {name!r} is asked for, and torch finds no GPU; use auto or cpu")
    state = _state(cpu=name == "cpu")
    _check_launch(state.num_processes)
    if state.num_processes == 1 and state.device.type == "cpu" and wanted is None and torch.cuda.is_available():
        wanted = torch.device("cuda", torch.cuda.current_device())  # an earlier run of this process was on the CPU
    # Of several processes each has a GPU of its own, whatever number is asked for. An earlier run may have asked for
    # another kind of device.
    own = wanted is None or (wanted.type == state.device.type and (wanted.index is None or state.num_processes > 1))
    device = state.device if own or wanted is None else wanted
    return torch.device("cpu") if device.type == "cpu" else device  # hosts have no number


def is_main() -> bool:
    """Whether this process writes."""
    return world()[0] == 0


def world() -> tuple[int, int]:
    """Return this process's rank and their number."""
    return (0, 1) if _apart else _world()


@contextlib.contextmanager
def apart() -> Iterator[int]:
    """Let this process work as if it were the only one, and wait for none; yields its rank among all."""
    global _apart
    before, _apart = _apart, True
    try:
        yield _world()[0]
    finally:
        _apart = before


def watch() -> None:
    """From here to `part`, end this process as soon as another one ends. All processes call this together."""
    rank, count = world()
    if count > 1:
        ties.bind(rank, count, _store(), EXCHANGE)


def part() -> None:
    """Let every process end when it likes from here on. All processes call this together."""
    wait()
    ties.release()


def tell(progress: str) -> None:
    """Note for those who wait for this process how far it is."""
    global _told
    rank, count = _world()
    if count > 1 and time.monotonic() - _told > 5:
        _told = time.monotonic()
        _store().set(f"ppcl/at/{rank}", progress)


def wait(report: Callable[[str], None] | None = None) -> None:
    """Wait for the other processes, however long they take while they tell progress; say to `report` for whom."""
    rank, count = world()
    if count == 1:
        return
    store, key = _store(), f"ppcl/wait/{next(_waits)}"
    try:
        store.set(f"{key}/{rank}", "")
        _until(store, [f"{key}/{other}" for other in range(count)], report)
        # The first process may hold the store: it goes last.
        store.set(f"{key}/{rank}/through", "")
        if rank == 0:
            _until(store, [f"{key}/{other}/through" for other in range(count)], report)
    except distributed.DistError as error:
        raise PpclError(
            "the process that holds what all share has ended; what is finished is kept, and the same command goes on"
        ) from error


def gathered(said: Sequence[str]) -> list[str]:
    """Return what all processes say, in their order, without repeats."""
    _, count = world()
    wait()
    return list(dict.fromkeys(gather_object(list(said)) if count > 1 else said))


def joined(found: dict[Any, Any]) -> dict[Any, Any]:
    """Return what all processes found, each of them other keys; all ask together."""
    _, count = world()
    wait()
    return dict(gather_object(list(found.items()))) if count > 1 else found


def check_shared(folder: Path) -> None:
    """Raise `PpclError` in every process where not all of them see what the first writes into `folder`."""
    rank, count = world()
    if count == 1:
        return
    token, place = agreed((secrets.token_hex(8), f"{folder} on {socket.gethostname()}"))
    mark = folder / ".shared"
    if rank == 0:
        mark.write_text(token)
    wait()
    blind = gathered([] if _reads(mark, token) else [f"process {rank} on {socket.gethostname()}"])
    if rank == 0:
        mark.unlink()
    if blind:
        raise PpclError(
            f"the processes of a run need one folder that all share: what process 0 writes into {place}, "
            f"{' and '.join(blind)} cannot read; name a folder on a shared file system"
        )


def agreed(value: Any) -> Any:
    """Return what the main process says; all ask together."""
    _, count = world()
    return broadcast_object_list([value])[0] if count > 1 else value


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let libraries take this process for the only one: transformers writes weights in the first of several alone."""
    known = distributed.is_initialized
    distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        distributed.is_initialized = known


def messages_on(device: torch.device) -> torch.device:
    """Return where a tensor must be to be sent to another process: on `device`, or on the host."""
    _, count = world()
    return device if count > 1 and "nccl" in torch.distributed.get_backend_config() else torch.device("cpu")


def average(value: Tensor) -> float:
    """Average a scalar over the processes."""
    _, count = world()
    if count > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return float(value) / count


def _world() -> tuple[int, int]:
    state = _state()
    return int(state.process_index), int(state.num_processes)


def _state(*, cpu: bool = False) -> PartialState:
    """Return the state of this process. Without a GPU accelerate must be told so, or it takes each for one alone."""
    group: dict[str, Any] = {}
    known = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if known and int(os.environ["WORLD_SIZE"]) > 1 and not distributed.is_initialized():
        store, rank, count = next(distributed.rendezvous("env://", timeout=EXCHANGE))
        group = {"store": _unwritten(store, rank, count), "rank": rank, "world_size": count}
    return PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=EXCHANGE, **group)


def _unwritten(store: Any, rank: int, count: int) -> Any:
    """Agree on a part of the store that is new: torchrun restarts processes with what they wrote the last time."""
    own, token = secrets.token_hex(8), secrets.token_hex(8)
    store.set(f"ppcl/hello/{rank}", own)
    if rank > 0:
        token = store.get(f"ppcl/welcome/{own}").decode()
        store.set(f"ppcl/{token}/{rank}", "")
        return distributed.PrefixStore(f"ppcl/{token}", store)
    began, others = time.monotonic(), range(1, count)
    while not store.check([f"ppcl/{token}/{other}" for other in others]):
        for hello in (f"ppcl/hello/{other}" for other in others):
            if store.check([hello]):
                store.set(f"ppcl/welcome/{store.get(hello).decode()}", token)
        if time.monotonic() - began > EXCHANGE.total_seconds():
            raise PpclError(f"not all of {count} processes have come within {EXCHANGE}")
        time.sleep(0.05)
    return distributed.PrefixStore(f"ppcl/{token}", store)


def _reads(mark: Path, token: str) -> bool:
    """Tell whether `token` comes to be in a file: file systems of several machines may take a while."""
    until = time.monotonic() + _LOOK
    while True:
        with contextlib.suppress(OSError):
            if mark.read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _until(store: Any, keys: list[str], report: Callable[[str], None] | None) -> None:
    """Return when all `keys` are in the store; each ends with the number of the process that sets it."""
    pause, heard, looked, known = 0.001, time.monotonic(), time.monotonic(), ""
    while not store.check(keys):
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)
        if time.monotonic() - looked < _LOOK:
            continue
        looked = time.monotonic()
        missing = [key.split("/")[3] for key in keys if not store.check([key])]
        told = [f"{other} ({_told_by(store, other)})" for other in missing]
        if (said := "waits for " + ", ".join(f"process {each}" for each in told)) != known:
            known, heard = said, looked
        if report is not None and missing:
            report(said)
        if looked - heard > SILENCE:
            raise PpclError(
                f"process {told[0]} has told no progress for {SILENCE / 60:.0f} minutes: it hangs; "
                "what is finished is kept, and the same command goes on"
            )


def _told_by(store: Any, rank: str) -> str:
    return store.get(f"ppcl/at/{rank}").decode() if store.check([f"ppcl/at/{rank}"]) else "no word yet"


def _check_launch(count: int) -> None:
    """Refuse to be one of several processes that do not know each other: all would write the same files."""
    launchers = {
        "the environment says WORLD_SIZE={}": os.environ.get("WORLD_SIZE", ""),
        "srun has started {} tasks": os.environ.get("SLURM_STEP_NUM_TASKS", ""),
        "mpirun has started {} processes": os.environ.get("OMPI_COMM_WORLD_SIZE", ""),
        "a launcher has started {} processes": os.environ.get("PMI_SIZE", ""),
        "accelerate was asked for {} processes": _asked_of_accelerate(),
    }
    for said, number in launchers.items():
        if count == 1 and number.isdecimal() and int(number) > 1:
            raise PpclError(
                f"{said.format(number)}, and this one is alone: start several with "
                f"`torchrun --nproc-per-node {number} -m ppcl_toolkit.cli compress ...`, or one without a launcher"
            )


def _asked_of_accelerate() -> str:
    """Return --num_processes of the `accelerate launch` that started this process: on CPUs it starts but one."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    start = " ".join(words[:4])
    if "accelerate" not in start or "launch" not in start:
        return ""
    said = " ".join(words).replace("-", "_").replace("=", " ").split()
    return next((number for word, number in itertools.pairwise(said) if word == "__num_processes"), "")
