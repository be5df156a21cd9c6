"""What machines refuse, in one sentence each: full disks, devices that are full or gone, processes that have ended."""

import errno
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import distributed

from ppcl_toolkit.errors import PpclError

_REFUSED = {
    errno.EROFS: "its file system can only be read",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.ENAMETOOLONG: "its name is too long",
}
_KEPT = "what is finished is kept, and the same command goes on"
_FULL = re.compile(r"out of memory|not enough memory|can't allocate memory|STATUS_ALLOC_FAILED")
_GONE = re.compile(r"CUDA( driver)? error|cuDNN error|CUBLAS_STATUS_|CUDNN_STATUS_|CUSOLVER_STATUS_")
_ALONE = re.compile(r"gloo|NCCL|Connection (was )?(closed|reset) by peer|Broken pipe")
_BUG = "device-side assert"
"""What a device says of a wrong index in a kernel: no sentence helps there, and the traceback is needed."""


class writing:
    """Turn what the machine refuses, while a block makes `path`, into one sentence."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        known = explained(error, self._path)
        if known is not None:
            raise known from error


def explained(error: BaseException | None, path: Path | None = None) -> PpclError | None:
    """Return in one sentence what happened and what helps, or None where nothing but the traceback tells."""
    if isinstance(error, OSError | SafetensorError):
        return _of_disk(error, path)
    said, place = " ".join(str(error).split()), f" while making {path}" if path else ""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said:
        return PpclError(
            f"out of memory on the host{place}; {_KEPT}. Fewer processes, or a smaller teacher.chunk, help"
        )
    if not isinstance(error, RuntimeError) or _BUG in said:
        return None
    if isinstance(error, torch.OutOfMemoryError) or _FULL.search(said):
        return PpclError(
            f"out of memory on the device{place} ({_first_sentences(said)}); what is finished is kept. "
            "`teacher.streamed: true` or smaller batches take less, `ppcl plan` says how much; the same command goes on"
        )
    if isinstance(error, torch.AcceleratorError) or _GONE.search(said):
        return PpclError(f"the device failed{place} ({_first_sentences(said)}); {_KEPT} when the device is well again")
    if isinstance(error, distributed.DistError) or _ALONE.search(said):
        return PpclError(f"another process ended or cannot be reached{place} ({_first_sentences(said)}); {_KEPT}")
    return None


def _first_sentences(said: str) -> str:
    """Shorten what a library says in a paragraph."""
    return said if len(said) < 160 else said[: said.rfind(" ", 0, 160)] + " ..."


def _brief(path: Path | str | None) -> str:
    return text if len(text := str(path)) <= 300 else f"{text[:297]}..."


def _of_disk(error: OSError | SafetensorError, path: Path | None) -> PpclError | None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, SafetensorError) and "No space left" in str(error)):
        place = f": cannot write {path}" if path else ""
        return PpclError(f"the disk is full{place}; what is finished is kept, run again with more room")
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return PpclError(f"cannot open or write {_brief(error.filename or path)}: {_REFUSED[error.errno]}")
    if isinstance(error, PermissionError):
        return PpclError(f"no permission to write {error.filename or path}")
    return None
