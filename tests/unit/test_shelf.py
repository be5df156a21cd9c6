"""What learns waits at one place on the host; beyond a limit, that is a file without a name."""

import errno
import os
from pathlib import Path

import pytest
import torch

from ppcl_toolkit.training.shelf import Shelf


def mapped(folder: Path) -> int:
    """Files of a folder that this process has mapped, though they have no name any more."""
    return sum(str(folder) in line and "deleted" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_every_tensor_keeps_its_place(tmp_path):
    shelf = Shelf(tmp_path, limit=1000)
    first = shelf.put("a", torch.arange(100.0))
    again = shelf.put("a", torch.arange(100.0) + 1)
    assert first.data_ptr() == again.data_ptr()
    assert torch.equal(first, torch.arange(100.0) + 1)
    assert shelf.put("a", again).data_ptr() == first.data_ptr()


def test_what_is_beyond_the_limit_lies_in_files_that_nobody_finds(tmp_path):
    shelf = Shelf(tmp_path, limit=1000)
    values = {name: torch.randn(20, 10) for name in "abc"}
    kept = {name: shelf.put(name, value) for name, value in values.items()}
    assert mapped(tmp_path) == 2
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(kept[name], value) for name, value in values.items())
    half = shelf.put("half", torch.ones(3, 5, dtype=torch.bfloat16))
    assert (half.dtype, half.shape) == (torch.bfloat16, (3, 5))
    del shelf, kept, half
    assert mapped(tmp_path) == 0


def test_a_full_disk_is_found_when_the_place_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Shelf(tmp_path, limit=0).put("a", torch.ones(3))
