"""A device that is too small ends a command with one line, and the same command goes on where there is more room."""

import json
import re
import subprocess
import sys

import device
import pytest
from runs import CHECKPOINTED, job

TRAINING = (
    "depth.steps=3",
    "finetune.steps=2",
    "finetune.batch=24",
    "finetune.optimizer=adamw",
    "finetune.offload=none",
)
OVERRIDES = ("device=auto", "targets=[{name: small, params: 65%}]", *TRAINING)
ROOM_FOR_THE_TEACHER = 3_500_000
"""Bytes; of 18 blocks, and not of those that learn beside them."""
FITS_ALL_BUT_FINE_TUNING = 3_000_000
"""Bytes; training single blocks takes 2.1 MB beside the teacher, and the whole student with its large batches more."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("memory"), 5, 3)


def prepared(folder, dual, single):
    job(folder, *CHECKPOINTED, blocks=(dual, single))
    return folder


def commanded(world, memory, *more, out="out"):
    asked = ["compress", "--recipe", str(world / "recipe.yaml"), "--out", str(world / out)]
    options = [word for override in (*OVERRIDES, *more) for word in ("--set", override)]
    return subprocess.run(
        [sys.executable, "-m", "ppcl_toolkit.cli", *asked, *options],
        env={**device.environment(memory=memory), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_out_of_memory_is_one_line_and_more_memory_goes_on(world):
    done = commanded(world, FITS_ALL_BUT_FINE_TUNING)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.splitlines()
    made = world / "out" / "finetune" / "small"
    assert last.startswith(f"error: out of memory on the device while making {made}.partial (CUDA out of memory.")
    assert "what is finished is kept" in last
    assert "`teacher.streamed: true`" in last
    kept = {path: path.stat().st_mtime_ns for path in (world / "out" / "depth").rglob("*")}
    assert kept
    assert not made.exists()
    done = commanded(world, 100_000_000)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept == {path: path.stat().st_mtime_ns for path in (world / "out" / "depth").rglob("*")}
    assert (world / "out" / "summary.json").exists()


def test_stages_are_streamed_where_the_card_has_no_room_else(tmp_path_factory):
    world = prepared(tmp_path_factory.mktemp("auto"), 12, 6)
    fits = ("finetune.steps=0",)
    done = commanded(world, ROOM_FOR_THE_TEACHER, "teacher.streamed=false", *fits)
    assert done.returncode == 1
    (stage,) = re.findall(r"out of memory on the device while making .*/(depth|width).partial", done.stderr)
    done = commanded(world, ROOM_FOR_THE_TEACHER, *fits)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((world / "out" / "summary.json").read_text())["warnings"]
    assert said[0].startswith("teacher.streamed: auto is true for ") and stage in said[0]


def test_a_card_that_is_too_small_is_refused_before_anything_is_loaded(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ppcl_toolkit.cli",
        "compress",
        "--recipe",
        "flux_8b",
        "--out",
        str(tmp_path / "run"),
    ]
    ends = {**device.environment(memory=int(8e9)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: check does not fit a device of 8.0 GB, of which a tenth is spare: it takes 9.")
    assert not (tmp_path / "run").exists()
