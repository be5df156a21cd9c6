"""What machines refuse becomes one sentence that says what is kept and what helps; bugs keep their traceback."""

import errno
from pathlib import Path

import pytest
import torch
from torch import distributed

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.trouble import explained, writing

DEPTH = Path("run/depth.partial")
CUDA_FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB\nof which 1 is free."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA_FULL), "out of memory on the device while making run/depth.partial (CUDA out of"),
        (RuntimeError("CUDA error: out of memory"), "out of memory on the device"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "out of memory on the device",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory on the host"),
        (MemoryError(), "out of memory on the host"),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with"),
            "the device failed while making",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "the device failed"),
        (distributed.DistNetworkError("failed to recv, got 0 bytes"), "another process ended or cannot be reached"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), "another process ended"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: cannot write run/depth.partial"),
    ],
)
def test_trouble_is_one_sentence(error, said):
    with pytest.raises(PpclError) as caught, writing(DEPTH):
        raise error
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "what is finished is kept" in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        ValueError("out of memory"),
        FileNotFoundError("x"),
    ],
)
def test_a_bug_stays_what_it_is(error):
    assert explained(error) is None
    with pytest.raises(type(error)), writing(DEPTH):
        raise error
