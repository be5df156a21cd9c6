"""A pipeline over pretended devices: each holds its part of it all, and they train what the host trains."""

import json
import subprocess
import sys
from pathlib import Path

import device
import pytest
import slices_on_devices

from ppcl_toolkit.running.placement import Placement

SCRIPT = Path(slices_on_devices.__file__)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The loss curves of one process on the host."""
    folder = tmp_path_factory.mktemp("host")
    slices_on_devices.distilled(folder, Placement())
    return json.loads((folder / "losses.json").read_text())


def peaks(count, folder, schedule):
    """Distil on so many devices; return the most that each held, in bytes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    folder.mkdir()
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), schedule]
    ends = {**device.environment(devices=count), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"peak-{rank}.json").read_text()) for rank in range(count)]


def test_a_device_of_two_holds_little_more_than_half(tmp_path, host):
    (whole,) = peaks(1, tmp_path / "one", "resident")
    halves = peaks(2, tmp_path / "two", "resident")
    assert max(halves) < 0.7 * whole, (halves, whole)
    agree(tmp_path / "two", host)


def test_slices_may_be_streamed(tmp_path, host):
    streamed = peaks(2, tmp_path / "two", "streamed")
    resident = peaks(2, tmp_path / "other", "resident")
    assert max(streamed) < 0.7 * max(resident), (streamed, resident)
    agree(tmp_path / "two", host)


def agree(folder, wanted):
    """Fail where devices trained something else than the host: their attention is made of other operators."""
    found = json.loads((folder / "bank" / "losses.json").read_text())
    assert found.keys() == wanted.keys()
    assert len(found) == 6
    for key, curve in wanted.items():
        assert [loss for _, loss in found[key]] == pytest.approx([loss for _, loss in curve], rel=1e-3)
