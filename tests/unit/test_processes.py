"""Waits tell for whom, and end when nothing is told; processes that do not know each other are refused."""

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
