"""Where tensors live: decided here, and nowhere else.

A teacher rests on the device (*resident*), or its blocks rest on the host (*streamed*) and come to the device when
their turn comes, with what reads them. Pipelines come with as many of their parts as there is memory for.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.running.capture import map_tensors

HOST = torch.device("cpu")
ROOM = 0.85
"""Share of a device's memory that weights may take when a pipeline is called: the rest is for activations."""
_WHOLE = 1.06
"""By how much more room there has to be for all parts of a pipeline than they weigh."""
RESIDENT, IN_TURN, ALONE, BY_BLOCKS = "resident", "parts in turn", "one part at a time", "transformer by blocks"
"""How a pipeline is called: all of it is on the device; or its transformer and one other part; or what is called alone;
or a block of its transformer at most."""


class Placed(Protocol):
    """What moves its own weights."""

    def place(self, device: torch.device) -> None:
        """Move them to `device`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a teacher is run, and where it waits."""

    device: torch.device = field(default_factory=lambda: HOST)
    streamed: bool = False
    """Blocks come to the device one at a time, and activations wait on the host."""
    chunk: int = 1
    """Batches that share one visit of a block, when streamed."""
    waiting: int | None = None
    """Bytes of the host in which blocks that learn may wait, when streamed; more of them wait in files."""

    @property
    def rest(self) -> torch.device:
        """Where blocks and activations wait."""
        return HOST if self.streamed else self.device

    def bring(self, value: Any) -> Any:
        """Return nested tensors on the device."""
        return moved(value, self.device)

    def leave(self, value: Any) -> Any:
        """Return nested tensors where activations wait."""
        return moved(value, self.rest)

    def settle(
        self, transformer: nn.Module, adapter: Adapter, homes: "Homes", held: Collection[tuple[str, int]] | None = None
    ) -> None:
        """Put a teacher to rest: its blocks where they wait, everything else on the device.

        Blocks that are not `held`, by path of their stack and number, are on the host.
        """
        inside = tuple(f"{stack.path}." for stack in adapter.stacks)
        for name, tensor in _tensors(transformer):
            if not name.startswith(inside):
                homes.move(tensor, self.device)
        for stack in adapter.stacks:
            for index, block in enumerate(stack.blocks(transformer)):
                place = self.rest if held is None or (stack.path, index) in held else HOST
                for _, tensor in _tensors(block):
                    homes.move(tensor, place)

    @contextlib.contextmanager
    def visit(self, module: nn.Module | None, others: Iterable[Placed] = ()) -> Iterator[None]:
        """Have a module, and others that move themselves, on the device for a while.

        Weights that do not learn go home to the very memory that they came from: nothing is copied back.
        """
        if not self.streamed:
            yield
            return
        homes = [(tensor, tensor.data) for _, tensor in (_tensors(module) if module else [])]
        for tensor, home in homes:
            tensor.data = home.to(self.device)
        for other in others:
            other.place(self.device)
        try:
            yield
        finally:
            for other in others:
                other.place(self.rest)
            for tensor, home in homes:
                tensor.data = tensor.data.to(self.rest) if tensor.requires_grad else home

    @contextlib.contextmanager
    def visiting(self, *modules: nn.Module) -> Iterator[None]:
        """Have each of `modules` on the device whenever it is called."""
        with contextlib.ExitStack() as handles, contextlib.ExitStack() as present:
            for module in modules if self.streamed else ():
                before = module.register_forward_pre_hook(lambda m, _: present.enter_context(self.visit(m)))
                after = module.register_forward_hook(lambda *_: present.close())
                handles.callback(before.remove)
                handles.callback(after.remove)
            yield

    @contextlib.contextmanager
    def whole(self, transformer: nn.Module, adapter: Adapter) -> Iterator[None]:
        """Let a settled teacher be called as a whole."""
        with self.visiting(*(block for stack in adapter.stacks for block in stack.blocks(transformer))):
            yield


@final
class Homes:
    """The memory of the host from which frozen weights went to a device, so that nothing is copied when they return.

    As a rule these are pages of the files that the weights were read from: the system may drop them at any time.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, Tensor] = {}

    def move(self, tensor: Tensor, device: torch.device) -> None:
        """Move a weight to `device`, or home where that is the host."""
        if tensor.device.type == device.type:
            tensor.data = tensor.data.to(device)
            return
        if tensor.device == HOST:
            self._known[tensor] = tensor.data
        home = self._known.get(tensor) if device == HOST else None
        tensor.data = tensor.data.to(device) if home is None else home

    def carry(self, module: nn.Module, device: torch.device) -> None:
        """Move all weights of a module."""
        for _, tensor in _tensors(module):
            self.move(tensor, device)


def moved(value: Any, device: torch.device) -> Any:
    """Return nested tensors on `device`, there when this returns; what stands in several places is moved once."""
    known: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.to(device)
        return known[id(tensor)]

    return map_tensors(value, move)


def host_bytes() -> int:
    """Return what the host has for this process: its memory, shared out over the processes that torchrun put there."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device_of(transformer: nn.Module, adapter: Adapter) -> torch.device:
    """Return where a transformer computes: where its weights outside of the blocks are."""
    inside = tuple(f"{stack.path}." for stack in adapter.stacks)
    return next(tensor.device for name, tensor in _tensors(transformer) if not name.startswith(inside))


@contextlib.contextmanager
def callable_on(pipeline: Any, device: torch.device, *, streamed: bool = False) -> Iterator[None]:
    """Let a diffusers pipeline be called on `device`, with as many of its parts there as there is memory for.

    Where all fit, all are there. Otherwise each part comes when it is called and leaves for the next one, the
    transformer, too, where it does not fit beside the largest other part. One that does not fit at all comes block by
    block (diffusers' group offloading), as it does when `streamed`. Afterwards every part is where it was.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    others = [part for name, part in parts.items() if name != "transformer"]
    sizes = [_away(part, device) for part in others]
    means = calling_means(
        _away(pipeline.transformer, device), sizes, lambda size: has_room(size, device), streamed=streamed
    )
    with _returning(parts.values()), contextlib.ExitStack() as handles:
        if device.type == "cpu" or means == RESIDENT:
            pipeline.to(device)
        else:
            handles.callback(_take_turns(pipeline.transformer, others, device, means))
        yield


def calling_means(
    transformer: int, others: Collection[int], has: Callable[[int], bool], *, streamed: bool = False
) -> str:
    """Return how a pipeline is called whose parts weigh so many bytes, where `has` tells how many there is room for.

    All parts together want more room left than one in turn: it is beside them all that pictures are decoded.
    """
    if not streamed and has(round(_WHOLE * (transformer + sum(others)))):
        return RESIDENT
    if not streamed and has(transformer + max(others, default=0)):
        return IN_TURN
    if not streamed and has(max(transformer, *others)):
        return ALONE
    return BY_BLOCKS


@contextlib.contextmanager
def computing_on(transformer: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a transformer be called on `device`, block by block where it does not fit; afterwards it is where it was."""
    with _returning([transformer]):
        if fits([transformer], device):
            transformer.to(device)
        else:
            _offload_blocks(transformer, device)
        yield


def fits(modules: Iterable[nn.Module], device: torch.device) -> bool:
    """Tell whether modules fit on `device` beside what is there already, with room for activations."""
    return has_room(sum(_away(module, device) for module in modules), device)


def has_room(weights: int, device: torch.device) -> bool:
    """Tell whether so many more bytes of weights fit on `device`: on the host, always."""
    if device.type == "cpu":
        return True
    return weights + torch.cuda.memory_allocated(device) <= ROOM * torch.cuda.mem_get_info(device)[1]


class _Turn(ModelHook):
    """Brings a part to the device when it is called, and sends others home first: nothing is copied to the host."""

    def __init__(self, device: torch.device, leaving: list[nn.Module], homes: Homes, *, comes: bool = True) -> None:
        self.execution_device = device
        self._leaving, self._homes, self._comes = leaving, homes, comes

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self._leaving:
            if other is not module:
                self._homes.carry(other, HOST)
        if self._comes:
            self._homes.carry(module, self.execution_device)
        return moved((args, kwargs), self.execution_device)


def _take_turns(transformer: Any, others: list[nn.Module], device: torch.device, means: str) -> Callable[[], None]:
    """Let parts come and go; returns what ends that for the transformer."""
    homes, alone = Homes(), means == ALONE
    if means == BY_BLOCKS:
        _offload_blocks(transformer, device)
    else:
        homes.carry(transformer, HOST if alone else device)
    for part in others:
        homes.carry(part, HOST)
        add_hook_to_module(part, _Turn(device, [transformer, *others] if alone else others, homes))

    def send(*_: Any) -> None:
        for part in others:
            homes.carry(part, HOST)

    # Group offloading sets the transformer's forward anew behind its first call: a hook around that would be lost.
    handle = transformer.register_forward_pre_hook(send)
    add_hook_to_module(transformer, _Turn(device, [], homes, comes=alone), append=True)
    return handle.remove


def _offload_blocks(transformer: Any, device: torch.device) -> None:
    transformer.to(HOST)
    # Pinned block by block: a second, pinned copy of all weights would take as much of the host again.
    transformer.enable_group_offload(
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        low_cpu_mem_usage=True,
    )


@contextlib.contextmanager
def _returning(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Bring frozen modules back to where they were; host memory is kept, so that nothing is copied back."""
    parts = list(parts)
    tables: list[Any] = [
        t for part in parts for module in part.modules() for t in (module._parameters, module._buffers)
    ]
    slots = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    homes = [tensor.data if tensor.device == HOST else tensor.device for _, _, tensor in slots]
    try:
        yield
    finally:
        for part in parts:
            _release(part)
        for (table, name, tensor), home in zip(slots, homes, strict=True):
            now = table[name]  # `Module.to` makes new buffers
            assert now is not None
            tensor.data = home if isinstance(home, Tensor) else now.data.to(home)
            table[name] = tensor


def _release(part: nn.Module) -> None:
    """Take all hooks from a part, and all that they left on its modules."""
    if getattr(part, "_hf_hook", None) is not None:
        remove_hook_from_module(part)
        vars(part).pop("forward", None)
    for module in part.modules():
        # Blocks are changed in class later: a forward that stays on the instance would hide theirs.
        if vars(module).pop("_diffusers_hook", None) is not None:
            vars(module).pop("forward", None)


def _away(module: nn.Module, device: torch.device) -> int:
    """Bytes of a module that are not on `device`."""
    return sum(tensor.nbytes for _, tensor in _tensors(module) if tensor.device.type != device.type)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
