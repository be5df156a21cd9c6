"""The seams between this package's real code and tensors without data: what torch cannot do with those.

`activate` comes before torch is imported: autograd asks a device for its guard, and a CPU build has none for CUDA.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRETEND = Path(__file__).parents[1] / "pretend" / "device.py"


def activate() -> Any:
    """Give this process a device to which fake tensors can lay claim; return the ledger of them."""
    assert "torch" not in sys.modules, "torch asks for devices while it is imported"
    spec = importlib.util.spec_from_file_location("pretend_device", PRETEND)
    assert spec is not None
    assert spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    device.activate()
    import torch
    from ledger import Ledger

    ledger = Ledger()
    torch.autograd.set_multithreading_enabled(False)
    torch.cuda.memory_allocated = lambda *_: ledger.live["cuda:0"]
    torch.cuda.max_memory_allocated = lambda *_: ledger.peak["cuda:0"]
    torch.cuda.mem_get_info = lambda *_: (ledger.card - ledger.live["cuda:0"], ledger.card)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=ledger.card, major=8, minor=0)
    for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "ones_", "zeros_"):
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)  # there is nothing to fill
    _tell_of_sizes(ledger)
    _move_by_data()
    _attend()
    _take_for_tensors()
    return ledger


def join(devices: int, rank: int, host: int, ledger: Any) -> None:
    """Be one of some processes on a host, whose partners answer at once; what uses them is imported by now."""
    from ppcl_toolkit import processes
    from ppcl_toolkit.training import means

    everywhere(means._free_on_host, lambda: host - ledger.live["cpu"])
    everywhere(processes.average, lambda _: 0.0)  # of losses, and of how many processes met one that is not finite
    if devices == 1:
        return
    import torch
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=devices, store=FakeStore())
    mesh = torch.distributed.device_mesh.init_device_mesh

    def init_device_mesh(*arguments: Any, **options: Any) -> Any:
        # It looks its ranks up in a tensor.
        with torch.utils._python_dispatch._disable_current_modes():
            return mesh(*arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("ppcl_toolkit") and vars(module).get("init_device_mesh") is mesh:
            module.init_device_mesh = init_device_mesh  # type: ignore[attr-defined]
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagated(*arguments: Any, **options: Any) -> Any:
        with ledger.aside():  # on whole tensors, to know the shape of a part
            return propagate(*arguments, **options)

    ShardingPropagator._propagate_tensor_meta_non_cached = propagated
    everywhere(processes.world, lambda: (rank, devices))
    everywhere(processes.is_main, lambda: False)  # what the others wrote is not there to be put together
    everywhere(processes.wait, lambda: None)
    everywhere(processes.agreed, int)
    everywhere(processes.messages_on, lambda device: device)
    everywhere(processes.gathered, list)


def hand_over(calls: Mapping[str, Any], batch: int) -> None:
    """Let batches come in from the process before, which would tell their shapes in a tensor."""
    import torch

    from ppcl_toolkit.running import pipelined

    _, streams = next(iter(calls.values()))

    def take(link: Any, _: int) -> list[Any]:
        baggage = link._share.incoming
        made = [torch.empty(batch, *s.shape[1:], dtype=s.dtype, device=link._device) for s in streams if s is not None]
        # Streams of the teacher, none of a student, those at the first blocks of readers, and texts of references.
        opened = [torch.empty_like(each) for _ in baggage.opened for each in made]
        texts = [torch.empty_like(made[-1]) for _ in (*baggage.z, *baggage.h)]
        return [*made, *[None] * (4 - len(made)), *opened, *texts]

    pipelined.Link._take = take


def everywhere(function: Any, other: Any) -> None:
    """Put another function in place of one of this package, wherever it was imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ppcl_toolkit"):
            for key in [key for key, value in vars(module).items() if value is function]:
                setattr(module, key, other)


def _move_by_data() -> None:
    """Move modules as plain parameters are: by `data`, which keeps who they are."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    data: Any = torch._C.TensorBase.data

    def put(tensor: Any, value: Any) -> None:
        data.__set__(tensor, value)
        if isinstance(value, FakeTensor) and isinstance(tensor, FakeTensor):
            tensor.fake_device = value.fake_device

    FakeTensor.data = property(data.__get__, put)

    def become(parameter: Any, function: Any) -> Any:
        with torch.no_grad():
            moved = function(parameter)
        # As with real ones: what is without weights becomes another parameter, not the same one elsewhere.
        if "meta" in (parameter.device.type, moved.device.type):
            return torch.nn.Parameter(moved, parameter.requires_grad)
        if moved is not parameter:
            parameter.data = moved
        if parameter.grad is not None:
            parameter.grad.data = function(parameter.grad)
        return parameter

    def apply(module: Any, function: Any, recurse: bool = True) -> Any:
        for child in module.children() if recurse else ():
            child._apply(function)
        owned = {name: own for name, own in module._parameters.items() if own is not None}
        module._parameters.update({name: become(own, function) for name, own in owned.items()})
        buffers = {name: own for name, own in module._buffers.items() if own is not None}
        module._buffers.update({name: function(own) for name, own in buffers.items()})
        return module

    torch.nn.Module._apply = apply


def _tell_of_sizes(ledger: Any) -> None:
    """Let the ledger know of memory that is given back while its tensor lives on."""
    import torch

    resize = torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:
        ledger.resized(storage, size)
        return resize(storage, size)

    torch.UntypedStorage.resize_ = resized


def _attend() -> None:
    """Attend by the kernel that a card would choose, which keeps no matrix of tokens by tokens."""
    import torch
    from torch.nn import functional

    usual = functional.scaled_dot_product_attention

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *more: Any, **also: Any
    ) -> Any:
        if not query.is_cuda:
            return usual(query, key, value, attn_mask, dropout_p, *more, **also)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (each.to(dtype) for each in (query, key, value))
        causal, scale = also.get("is_causal", False), also.get("scale")
        if attn_mask is None and query.dtype != torch.float32:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, causal, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = (
                attn_mask.to(query.dtype)
                if attn_mask.dtype != torch.bool
                else torch.zeros_like(attn_mask, dtype=query.dtype)
            )
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        saves = torch.is_grad_enabled() and query.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, saves, dropout_p, causal, scale=scale
        )[0]

    functional.scaled_dot_product_attention = attention


def _take_for_tensors() -> None:
    """Let what asks for the plain type of a tensor take fakes for it: optimizers and clipping go by lists, then."""
    from torch._subclasses.fake_tensor import FakeTensor

    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        importlib.import_module(name)._foreach_supported_types.append(FakeTensor)
