"""Waits tell for whom, and end when nothing is told; processes that do not know each other are refused."""

import re
import subprocess
import sys

import pytest
from torch import distributed

from ppcl_toolkit import processes
from ppcl_toolkit.errors import PpclError


def test_a_wait_says_for_whom_and_how_far_they_are(monkeypatch):
    monkeypatch.setattr(processes, "_LOOK", 0.01)
    store, said = distributed.HashStore(), []
    keys = [f"ppcl/wait/7/{rank}" for rank in range(3)]
    store.set(keys[0], "")
    store.set("ppcl/at/2", "depth 3/12")

    def report(line):
        said.append(line)
        for key in keys[len(said) :]:
            store.set(key, "")

    processes._until(store, keys, report)
    assert said == ["waits for process 1 (no word yet), process 2 (depth 3/12)"]


def test_a_process_that_tells_nothing_for_long_ends_the_wait(monkeypatch):
    monkeypatch.setattr(processes, "_LOOK", 0.01)
    monkeypatch.setattr(processes, "SILENCE", 0.1)
    store = distributed.HashStore()
    store.set("ppcl/at/1", "depth 3/12")
    with pytest.raises(
        PpclError, match=r"process 1 \(depth 3/12\) has told no progress for .*the same command goes on"
    ):
        processes._until(store, ["ppcl/wait/0/1"], None)


APART = """
import os, sys
from pathlib import Path
from ppcl_toolkit import PpclError, processes
from ppcl_toolkit.artifacts.workspace import Workspace
processes._LOOK = 0.5
processes.pick_device("cpu")
out = Path(sys.argv[1]) / (os.environ["RANK"] if sys.argv[2] == "apart" else "one")
if sys.argv[2] == "apart":
    (out / "run").mkdir(parents=True)
    (out / "run" / "recipe.yaml").touch()
run = Workspace(out / "run")
try:
    run.open("")
except PpclError as error:
    said = str(error)
else:
    said = "opened"
Path(sys.argv[1], f"said-{os.environ['RANK']}").write_text(said)
processes.part()
"""


@pytest.mark.parametrize("folder", ["apart", "one"])
def test_processes_that_share_no_folder_are_refused_before_anything_is_made(tmp_path, folder):
    (tmp_path / "apart.py").write_text(APART)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "apart.py")]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path), folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = "opened" if folder == "one" else r"need one folder that all share: .*/0/run on .*process 1 on .* cannot"
    for rank in range(2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert re.search(wanted, said), said
    assert not list(tmp_path.rglob(".shared"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WORLD_SIZE", "the environment says WORLD_SIZE=4"),
        ("SLURM_STEP_NUM_TASKS", "srun has started 4 tasks"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun has started 4 processes"),
    ],
)
def test_one_of_several_that_stands_alone_is_refused(monkeypatch, name, said):
    monkeypatch.setenv(name, "4")
    with pytest.raises(PpclError, match=f"{said}, and this one is alone: .*torchrun --nproc-per-node 4"):
        processes._check_launch(1)
    processes._check_launch(4)
    monkeypatch.setenv(name, "1")
    processes._check_launch(1)
