"""Tensors without data that claim a device, and a ledger of the bytes that are alive on each.

A storage is counted when an operator makes it and taken off when it is collected. Views make nothing.
"""

import contextlib
import functools
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

GRAIN = 512
"""CUDA's allocator hands out multiples of it."""
_PACKAGE = f"{os.sep}ppcl_toolkit{os.sep}"
_HERE = str(Path(__file__).parent)
_SKIPPED = (f"{os.sep}torch{os.sep}", "<string>", __file__)
_ANSWERS = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}


class _Kind(NamedTuple):
    """What operators see of a tensor without data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Ledger(FakeTensorMode):
    """Fake tensors, and what they would take: live and highest bytes, and where the highest was reached."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.detailed, self.card = False, 10**12
        self.held: dict[str, Counter[str]] = {}
        """Where a detailed ledger is asked for: the bytes alive at the peak of a device, by the line that made them."""
        self._inside = self._reading = False
        self._rising: set[str] = set()
        self._sizes: dict[int, tuple[str, int, str]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.place: dict[str, str] = {}
        self._known: dict[int, Any] = {}
        self._outputs: dict[Any, list[_Kind] | None] = {}

    def __deepcopy__(self, memo: Any) -> "Ledger":
        # A copied tensor would bring its mode along.
        return self

    @contextlib.contextmanager
    def reading(self, *, here: bool) -> Iterator[None]:
        """If `here`, take what is made on the host for weights that are read where they lie, in files."""
        before, self._reading = self._reading, here
        try:
            yield
        finally:
            self._reading = before

    def begin(self) -> None:
        """Forget earlier peaks: what is alive now is where a stage starts."""
        self.peak = Counter(self.live)
        self.place, self.held = {}, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on shapes; what would read values is answered."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return _ANSWERS.get(args[0].dtype, 0)  # whole numbers are error codes: 0 is none
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._pin_memory.default:
            func, args = torch.ops.aten.clone.default, args[:1]
        counts = not self._inside and not func.is_view
        # What an operator's shapes are worked out by is no kernel of a card.
        with self.aside():
            made = self._made(func, types, args, kwargs or {})
        if counts and func is not torch.ops.aten.from_file.default:  # pages of a file are no memory that must be there
            self._note(made, func)
        return made

    def _made(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operator makes: of kinds of tensors that it met before, by what came out then."""
        if _is_view(func) and _is_plain(args):
            with in_kernel_invocation_manager(self):
                seen = func(*args, **kwargs)
            place = args[0].fake_device
            single = isinstance(seen, torch.Tensor)
            return FakeTensor(self, seen, place) if single else [FakeTensor(self, each, place) for each in seen]
        key = (func, *_kinds((args, kwargs))) if _makes_anew(func) else ()
        if not key or any(each is None for each in key):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if key not in self._outputs:
            made = super().__torch_dispatch__(func, types, args, kwargs)
            several = made if isinstance(made, tuple) else (made,)
            plain = all(isinstance(each, FakeTensor) for each in several)
            found = [kind for each in several for kind in _kinds(each)]
            self._outputs[key] = found if plain and None not in found else None
            return made
        known = self._outputs[key]
        if known is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with in_kernel_invocation_manager(self):
            empty = [torch.empty_strided(k.shape, k.stride, dtype=k.dtype, device="meta") for k in known]
        fakes = [FakeTensor(self, each, kind.device) for each, kind in zip(empty, known, strict=True)]
        return fakes[0] if len(func._schema.returns) == 1 else tuple(fakes)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Count nothing: what torch works out on shapes of its own accord is no memory."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def _note(self, made: Any, func: Any) -> None:
        if isinstance(made, FakeTensor):
            self._count(made, func)
        elif isinstance(made, tuple | list):
            for each in made:
                if isinstance(each, FakeTensor):
                    self._count(each, func)

    def _count(self, tensor: FakeTensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            device = str(tensor.fake_device)
            device = "files" if self._reading and device == "cpu" else device
            self._known[key] = (weakref.ref(storage, lambda _, key=key: self._forget(key)), device)
            self._rise(key, device, storage.nbytes(), func._schema.name.removeprefix("aten::"))

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Note that a storage has another size from now on: FSDP lets go of gathered weights so."""
        key = storage._cdata
        if key in self._known:
            device = self._known[key][1]
            self._fall(key, device)
            self._rise(key, device, size, "resize_")

    def _rise(self, key: int, device: str, size: int, operator: str) -> None:
        size = -(-size // GRAIN) * GRAIN
        line = f"{where()} ({operator})" if self.detailed or self.live[device] + size > self.peak[device] else ""
        self._sizes[key] = (device, size, line)
        self.live[device] += size
        if self.live[device] > self.peak[device]:
            self.peak[device] = self.live[device]
            self.place[device] = line
            self._rising.add(device)

    def _fall(self, key: int, device: str) -> None:
        known = sum(self.held.get(device, {}).values())
        if self.detailed and device in self._rising and self.peak[device] > 1.002 * known:
            self._snapshot(device)
        self._rising.discard(device)
        self.live[device] -= self._sizes.pop(key)[1]

    def _forget(self, key: int) -> None:
        self._fall(key, self._known.pop(key)[1])

    def _snapshot(self, device: str) -> None:
        self.held[device] = Counter()
        for own, size, line in self._sizes.values():
            if own == device:
                self.held[device][line] += size


@functools.cache
def _is_view(func: Any) -> bool:
    composed = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    # Detached tensors stay of their class, even in a kernel.
    return bool(func.is_view) and not composed and func is not torch.ops.aten.detach.default


@functools.cache
def _makes_anew(func: Any) -> bool:
    """Whether all that an operator returns is new memory, and nothing that it is given is changed."""
    schema = func._schema
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns)) and bool(schema.returns)


def _is_plain(args: Any) -> bool:
    """Whether a view is one of a tensor without data, at places that are known."""
    first, *others = args
    known = isinstance(first, FakeTensor) and first.constant is None
    return known and not any(isinstance(each, torch.Tensor) for each in others)


def _kinds(value: Any) -> Iterator[Any]:
    """Yield what a result depends on in nested arguments; None where that are values."""
    if isinstance(value, FakeTensor):
        plain = value.constant is None and value.layout is torch.strided
        yield _Kind(value.shape, value.stride(), value.dtype, value.fake_device) if plain else None
    elif isinstance(value, tuple | list):
        yield len(value)
        for each in value:
            yield from _kinds(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _kinds(each)
    elif value is None:
        yield ""
    elif isinstance(value, torch.Tensor | torch.ScriptObject):
        yield None
    else:
        yield type(value)
        yield value


def where() -> str:
    """Name the source line of this package that runs, and in which library."""
    frame: Any = sys._getframe(1)
    inner = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if _PACKAGE in name and not name.startswith(_HERE):
            line = f"{name.rpartition(_PACKAGE)[2]}:{frame.f_lineno}"
            return f"{line} {inner}".strip()
        if not inner and not any(skipped in name for skipped in _SKIPPED):
            inner = f"in {Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return inner or "autograd"
