"""Tensors without data that claim a device, and a ledger of the bytes that are alive on each.

A storage is counted when an operator makes it and taken off when it is collected. Views make nothing.
"""

import contextlib
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

GRAIN = 512
"""CUDA's allocator hands out multiples of it."""
_PACKAGE = f"{os.sep}ppcl_toolkit{os.sep}"
_HERE = str(Path(__file__).parent)
_SKIPPED = (f"{os.sep}torch{os.sep}", "<string>", __file__)
_ANSWERS = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}


class Ledger(FakeTensorMode):
    """Fake tensors, and what they would take: live and highest bytes, and where the highest was reached."""

    def __init__(self, *, detailed: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.detailed = detailed
        self.held: dict[str, Counter[str]] = {}
        """Where a detailed ledger is asked for: the bytes alive at the peak of a device, by the line that made them."""
        self._inside = self._reading = False
        self._rising: set[str] = set()
        self._sizes: dict[int, tuple[str, int, str]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.place: dict[str, str] = {}
        self._known: dict[int, Any] = {}

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
        counts = not self._inside and not func.is_view
        # What an operator's shapes are worked out by is no kernel of a card.
        with self.aside():
            made = super().__torch_dispatch__(func, types, args, kwargs or {})
        if counts and func is not torch.ops.aten.from_file.default:  # pages of a file are no memory that must be there
            self._note(made, func)
        return made

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
