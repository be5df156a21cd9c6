"""Give a process a GPU that is not there: `cuda.cpp` fills torch's CUDA key, and `torch.cuda` is patched to know it.

Whoever wants the device gives a fresh process `environment()`; it and the Python processes that it starts load the
device through `site/sitecustomize.py`, before they import torch:

    PYTHONPATH=tests/pretend/site PRETEND_DEVICES=1 python -m ppcl_toolkit.cli compress --recipe tiny

PRETEND_DEVICES is their number (1 to 8), PRETEND_MEMORY the bytes of each.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
NAME = "Pretended GPU"
CAPABILITY = (8, 0)


def environment(devices: int = 1, memory: int | None = None) -> dict[str, str]:
    """Return the variables of a process that shall have `devices` pretended GPUs of `memory` bytes."""
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    size = {} if memory is None else {"PRETEND_MEMORY": str(memory)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PRETEND_DEVICES": str(devices), **size}


def missing() -> str:
    """Return what the device lacks on this machine, in words; empty where it lacks nothing."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "torch is a build with CUDA, and the pretended device needs one for CPUs"
    if not _built().exists() and shutil.which(_compiler()) is None:
        return f"there is no C++ compiler: {_compiler()!r} is not found (CXX chooses another)"
    return ""


def build() -> Path:
    """Return the library, compiled at the first call for a torch and a source."""
    built = _built()
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        includes = [f"-I{_torch() / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        options = ["-O1", "-shared", "-fPIC", "-std=c++20", "-w", *includes]
        command = [_compiler(), *options, str(HERE / "cuda.cpp"), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the pretended device does not compile:\n{done.stderr[-3000:]}")
        unfinished.replace(built)
    return built


def activate() -> None:
    """Make the device part of this process, which has not imported torch yet."""
    if lacks := missing():
        raise RuntimeError(lacks)
    assert "torch" not in sys.modules, "torch reads its hooks while it is imported, and they come too late"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build()), ctypes.RTLD_GLOBAL)
    for name in ("live", "peak", "limit"):
        getattr(library, f"pretend_{name}").restype = ctypes.c_int64
    library.pretend_set_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.pretend_resize_storage.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    import torch

    _patch_devices(torch, library)
    _patch_memory(torch, library)
    _patch_streams(torch)
    _patch_random(torch)
    _patch_storage(torch, library)
    _patch_distributed(torch)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _built() -> Path:
    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
    known = [importlib.metadata.version("torch"), sysconfig.get_platform(), *(s.read_text() for s in sources)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ppcl-toolkit" / f"pretend-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.so"


def _always(value: Any) -> Any:
    return lambda *_, **__: value


def _put(module: Any, **functions: Any) -> None:
    for name, function in functions.items():
        setattr(module, name, function)


def _patch_devices(torch: Any, library: ctypes.CDLL) -> None:
    accelerator = torch.accelerator

    def index(device: Any = None) -> int:
        return torch.cuda._utils._get_device_index(device, optional=True)

    def set_device(device: Any) -> None:
        accelerator.set_device_index(index(device))

    def exchange(device: int) -> int:
        before = accelerator.current_device_index()
        if device >= 0:
            accelerator.set_device_index(device)
        return before

    _put(
        torch.cuda,
        _lazy_init=_always(None),
        _lazy_call=lambda function, **_: function(),
        _exchange_device=exchange,
        _maybe_exchange_device=exchange,
        init=_always(None),
        is_initialized=_always(True),
        is_available=_always(True),
        device_count=lambda: library.pretend_devices(),
        current_device=accelerator.current_device_index,
        set_device=set_device,
        is_bf16_supported=_always(True),
        is_tf32_supported=_always(True),
        get_arch_list=_always(["sm_80"]),
        get_device_name=_always(NAME),
        get_device_capability=_always(CAPABILITY),
        can_device_access_peer=_always(True),
        ipc_collect=_always(None),
    )


def _patch_memory(torch: Any, library: ctypes.CDLL) -> None:
    def index(device: Any = None) -> int:
        return torch.cuda._utils._get_device_index(device, optional=True)

    def live(device: Any = None) -> int:
        return library.pretend_live(index(device))

    def peak(device: Any = None) -> int:
        return library.pretend_peak(index(device))

    def limit(device: Any = None) -> int:
        return library.pretend_limit(index(device))

    def set_fraction(fraction: float, device: Any = None) -> None:
        library.pretend_set_limit(index(device), int(fraction * memory))

    memory = int(os.environ.get("PRETEND_MEMORY") or limit(0))
    for device in range(torch.cuda.device_count()):
        library.pretend_set_limit(device, memory)
    functions = {
        "empty_cache": _always(None),
        "memory_allocated": live,
        "memory_reserved": live,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": lambda device=None: library.pretend_reset_peak(index(device)),
        "mem_get_info": lambda device=None: (limit(device) - live(device), limit(device)),
        "memory_stats": lambda device=None: {
            "allocated_bytes.all.current": live(device),
            "allocated_bytes.all.peak": peak(device),
        },
        "set_per_process_memory_fraction": set_fraction,
    }
    for module in (torch.cuda, torch.cuda.memory):
        _put(module, **functions)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name=NAME, total_memory=limit(device), major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=1
    )


def _patch_streams(torch: Any) -> None:
    class Stream(torch.Stream):
        """The one stream of a device, under any name."""

        def __new__(cls, device: Any = None, *_: Any, **__: Any) -> Any:
            return super().__new__(cls, device=torch.device("cuda", torch.cuda._utils._get_device_index(device, True)))

    class Event(torch.Event):
        """A point in that stream: to wait for it is to wait for all."""

        def __new__(cls, enable_timing: bool = False, **_: Any) -> Any:
            return super().__new__(cls, device="cuda", enable_timing=enable_timing)

    _put(
        torch.cuda,
        Stream=Stream,
        Event=Event,
        stream=lambda stream: contextlib.nullcontext(stream),
        set_stream=_always(None),
        current_stream=lambda device=None: Stream(device),
        default_stream=lambda device=None: Stream(device),
        synchronize=lambda device=None: torch.accelerator.synchronize(
            torch.cuda._utils._get_device_index(device, True)
        ),
    )


def _patch_random(torch: Any) -> None:
    """Random numbers come from the host's generator: one state for all devices."""
    functions = {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * torch.cuda.device_count(),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": _always(None),
        "manual_seed_all": _always(None),
        "seed": _always(None),
        "seed_all": _always(None),
        "initial_seed": torch.initial_seed,
    }
    for module in (torch.cuda, torch.cuda.random):
        _put(module, **functions)


def _patch_storage(torch: Any, library: ctypes.CDLL) -> None:
    own, make = torch.UntypedStorage.resize_, torch.UntypedStorage.__new__

    def made(cls: type, *size: Any, device: Any = None, **options: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return make(cls, *size, **({} if device is None else {"device": device}), **options)
        return torch.empty(*size, dtype=torch.uint8, device=device).untyped_storage()

    def resize(storage: Any, size: int) -> Any:
        if storage.device.type != "cuda":
            return own(storage, size)
        with torch.cuda.device(storage.device):
            library.pretend_resize_storage(storage._cdata, size)
        return storage

    _put(torch.UntypedStorage, resize_=resize, __new__=made)


def _patch_distributed(torch: Any) -> None:
    """Processes talk through gloo, which finds a device's memory on the host."""
    distributed = torch.distributed
    begin = distributed.init_process_group
    both = "cpu:gloo,cuda:gloo"

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        options.pop("device_id", None)
        begin(both if backend is None or "nccl" in backend else backend, *arguments, **options)

    for module in (distributed, distributed.distributed_c10d):
        _put(module, init_process_group=init_process_group)
    distributed.Backend.default_device_backend_map["cuda"] = "gloo"
