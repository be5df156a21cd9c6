"""How a student is trained in the memory that there is: which optimizer, and where its blocks rest between steps."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.meta import without_data

GB = 1e9
_ROOM = 0.92
"""Share of a memory that can be planned with: drivers, caches and fragments take the rest."""
BYTES = {"adamw": (4, 4, 8.0, 0), "adamw8bit": (2, 0, 2.07, 64), "adafactor": (2, 0, 0.02, 24)}
"""Per parameter: its weight, a gradient that waits for the end of the backward, what the optimizer remembers; and, of
the largest weight alone, what computing its step in fp32 takes (without a compiler: with one it is less)."""
_ORDER = (
    ("adamw", "none"),
    ("adamw8bit", "none"),
    ("adamw8bit", "blocks"),
    ("adamw", "blocks"),
    ("adafactor", "none"),
    ("adafactor", "blocks"),
)
"""The nearest to fp32 first, and of those the fastest; the host's own AdamW over fp32 masters is slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, in parameters and bytes per process."""

    params: int
    block_params: int
    """Of all blocks together: these can rest on the host."""
    largest_block: int
    largest_weight: int
    activations: int
    """Bytes kept for the backward pass, as the recipe asks for it."""
    block_inputs: int
    """Bytes kept where each block computes again: the inputs of all, and the activations of one."""
    half: bool = True
    """The teacher is in bf16: weights may be, and blocks compute in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is, per process."""

    device_bytes: int
    host_bytes: int
    """Free on the host, shared out over the processes that are on it."""
    ranks: int = 1
    shard: bool = False


@dataclass(frozen=True, slots=True)
class Means:
    """How a student is trained, and what that takes of each process's device and host."""

    optimizer: str
    offload: str
    bytes_on_device: int = 0
    bytes_on_host: int = 0

    def fits(self, machine: Machine) -> bool:
        """Tell whether there is so much."""
        return self.bytes_on_device <= _ROOM * machine.device_bytes and self.bytes_on_host <= _ROOM * machine.host_bytes

    def __str__(self) -> str:
        return (
            f"optimizer {self.optimizer}, offload {self.offload}: {self.bytes_on_device / GB:.1f} GB of the device "
            f"and {self.bytes_on_host / GB:.1f} GB of the host"
        )


def check_optimizer(optimizer: str) -> None:
    """Raise a `PpclError` for an optimizer whose package is not installed."""
    if not _is_installed(optimizer):
        raise PpclError(
            f"finetune.optimizer: {optimizer} needs the package torchao: pip install 'ppcl-toolkit[lowmem]'; or take "
            "auto, adamw or adafactor"
        )


def choose_means(job: Job, machine: Machine, optimizer: str = "auto", offload: str = "auto") -> Means:
    """Return the first means that fit, of those asked for; where none is, a `PpclError` with what each would take.

    What is asked for by name is taken at its word.
    """
    spread = machine.shard and machine.ranks > 1
    asked = [
        means_of(job, machine, kind, rest)
        for kind, rest in _ORDER
        if (kind == optimizer or (optimizer == "auto" and _is_installed(kind)))
        and offload in ("auto", rest)
        and _possible(kind, rest, machine.ranks, spread=spread)
    ]
    if not asked:
        raise PpclError(
            f"finetune.optimizer: {optimizer} with finetune.offload: {offload} is not for {machine.ranks} processes"
            + (" that share out one student" if spread else "")
            + ": sharded, use adamw or adamw8bit and offload: none; not sharded, adamw steps on the device alone"
        )
    chosen = next((means for means in asked if means.fits(machine)), None)
    if chosen is None and "auto" not in (optimizer, offload):
        return asked[0]
    if chosen is None:
        raise PpclError(
            f"fine-tuning fits in no way: there are {machine.device_bytes / GB:.1f} GB of the device and "
            f"{machine.host_bytes / GB:.1f} GB of the host, and it takes at least {'; or '.join(map(str, asked))}"
            + ("" if _is_installed("adamw8bit") else "; with ppcl-toolkit[lowmem] there is adamw8bit, too")
        )
    return chosen


def means_of(job: Job, machine: Machine, optimizer: str, offload: str) -> Means:
    """Add up what one way of training takes: weights, gradients, moments and activations."""
    weight, gradient, moments, work = BYTES[optimizer]
    if not job.half:
        weight = 4
    work *= job.largest_weight
    if offload == "blocks":
        outside = job.params - job.block_params
        in_backward = optimizer != "adamw"
        # A block comes with its weights, gets gradients one by one, and brings its moments if it steps there.
        block = job.largest_block * (weight + (moments if in_backward else 4))
        device = (weight + gradient + moments) * outside + block + job.block_inputs + work
        return Means(optimizer, offload, int(device), int((weight + gradient + moments) * job.block_params))
    share = machine.ranks if machine.shard else 1
    # Masters are cast for every product, and the backward pass keeps what was cast.
    cast = 2 * (job.largest_block if job.activations == job.block_inputs else job.params)
    device = (weight + gradient + moments) * job.params / share + job.activations + work / share
    if optimizer == "adamw" and job.half and share == 1:
        device += cast
    if share > 1:
        # Two blocks are whole at a time, in the dtype in which they compute; gradients of one in fp32.
        device += job.largest_block * (2 * (2 if job.half else 4) + 4)
    return Means(optimizer, offload, int(device), 0)


def job_of(student: nn.Module, blocks: Sequence[nn.Module], call: Callable[[], Any], *, recomputed: bool) -> Job:
    """Measure a student on the meta device, which `call` runs on a batch: sizes, and what a backward pass keeps.

    With `recomputed`, the recipe has blocks compute again in the backward pass wherever they rest.
    """
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    kept, inputs = _kept(student, blocks, call)
    outside = kept[-1]
    again = outside + inputs + max(kept[:-1])
    return Job(
        params=sum(p.numel() for p in student.parameters()),
        block_params=sum(sizes),
        largest_block=max(sizes),
        largest_weight=max(p.numel() for p in student.parameters()),
        activations=again if recomputed else sum(kept),
        block_inputs=again,
        half=next(student.parameters()).dtype == torch.bfloat16,
    )


def _kept(student: nn.Module, blocks: Sequence[nn.Module], call: Callable[[], Any]) -> tuple[list[int], int]:
    """Return the bytes that each block keeps for its backward, last what the rest does, and those of all inputs."""
    weights = {parameter.untyped_storage()._cdata for parameter in student.parameters()}
    storages: list[dict[int, Any]] = [{} for _ in range(len(blocks) + 1)]
    given: list[int] = []
    inside = [len(blocks)]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and not any(storage._cdata in known for known in storages):
            storages[inside[0]][storage._cdata] = storage
        return tensor

    def enter(number: int, args: Any, kwargs: Any) -> None:
        inside[0] = number
        streams = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 2]
        given.append(sum(value.nbytes for value in streams))

    def leave(*_: Any) -> None:
        inside[0] = len(blocks)

    handles = [
        handle
        for number, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(lambda _, a, k, number=number: enter(number, a, k), with_kwargs=True),
            block.register_forward_hook(leave),
        )
    ]
    try:
        with torch.enable_grad(), without_data(), _Fused(), saved_tensors_hooks(keep, lambda tensor: tensor):
            output = call()
    finally:
        for handle in handles:
            handle.remove()
    del output
    return [sum(storage.nbytes() for storage in known.values()) for known in storages], sum(given)


class _Fused(TorchFunctionMode):
    """Attends by a kernel such as devices have: on tensors without data, torch takes one that keeps all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; of masks, which are not made here, attention keeps nothing more."""
        attends = getattr(func, "__name__", "") == "scaled_dot_product_attention"
        return (_attended if attends else func)(*args, **(kwargs or {}))


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return output


def machine_of(device: torch.device, ranks: int, *, shard: bool) -> Machine:
    """Return what this process has: all of its device, and its part of what is free on the host."""
    # torchrun says how many processes are on this host.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    total = torch.cuda.get_device_properties(device).total_memory
    return Machine(device_bytes=total, host_bytes=_free_on_host() // here, ranks=ranks, shard=shard)


def _free_on_host() -> int:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Other systems than Linux tell how much there is, not how much of it is free.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _is_installed(optimizer: str) -> bool:
    return optimizer != "adamw8bit" or importlib.util.find_spec("torchao") is not None


def _possible(optimizer: str, offload: str, ranks: int, *, spread: bool) -> bool:
    if spread:
        # Adafactor's statistics are of whole matrices; blocks of FSDP come and go by themselves.
        return optimizer != "adafactor" and offload == "none"
    return ranks == 1 or (optimizer, offload) != ("adamw", "blocks")
