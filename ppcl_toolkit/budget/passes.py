"""What running a block takes, counted on the meta device: nothing is computed, every tensor is followed.

Casts are those of CUDA's autocast, and attention is by a kernel that keeps no matrix of tokens by tokens.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppcl_toolkit.running.meta import without_data

_HALF = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, functional.conv2d}
_EXACT = {functional.layer_norm, functional.softmax, torch.softmax, torch.rsqrt, Tensor.rsqrt, Tensor.pow, torch.pow}
_EXACT |= {functional.rms_norm, functional.group_norm, functional.normalize, Tensor.norm, torch.norm}


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step of a block takes beside its weights and moments."""

    forward: int
    """Highest number of bytes until the loss is there."""
    backward: int
    """Highest number of bytes from then on, gradients included."""
    kept: int
    """Bytes that wait for the backward pass when the loss is there."""


def forward_peak(run: Callable[[], Any], half: torch.dtype | None = None) -> int:
    """Return the most bytes that `run` has made and not let go of at any time; what it returns is among them.

    With `half` it runs under autocast to that dtype.
    """
    with torch.no_grad(), without_data(), _Followed() as followed, _AsOnCards(half):
        kept = run()
        del kept
    return followed.peak


def training_peak(run: Callable[[], Tensor], dtype: torch.dtype) -> Step:
    """Count a forward pass under autocast to `dtype` that returns a loss, and its backward pass."""
    half = None if dtype == torch.float32 else dtype
    with _Followed() as followed:
        with torch.enable_grad(), without_data(), _AsOnCards(half):
            loss = run()
        before, followed.peak = followed.peak, followed.live
        kept = followed.live
        loss.backward()
    return Step(before, followed.peak, kept)


@contextlib.contextmanager
def learning(module: nn.Module) -> Iterator[nn.Module]:
    """Have gradients of a module, which has none afterwards."""
    module.requires_grad_(True)
    try:
        yield module
    finally:
        for parameter in module.parameters():
            parameter.grad = None


class _Followed(TorchDispatchMode):
    """Follows what operators make: live bytes and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            for each in made if isinstance(made, tuple | list) else (made,):
                if isinstance(each, Tensor):
                    self._follow(each)
        return made

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._let_go(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _let_go(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class _AsOnCards(TorchFunctionMode):
    """Casts as autocast does on CUDA, and attends by flash attention; without a dtype nothing is cast."""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self._half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        wanted = (self._half if func in _HALF else torch.float32 if func in _EXACT else None) if self._half else None
        if wanted is not None:
            args, kwargs = _cast(args, wanted), _cast(kwargs, wanted)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        half = self._half or (torch.bfloat16 if query.dtype == torch.float32 else query.dtype)
        made = torch.ops.aten._scaled_dot_product_flash_attention(query.to(half), key.to(half), value.to(half))[0]
        return made.to(query.dtype) if self._half is None else made


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, tuple) else value
