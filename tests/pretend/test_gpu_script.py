"""tests/gpu.py, which a person runs on a card, runs here on small teachers: what it says of them matters to nobody."""

import subprocess
import sys
from pathlib import Path

import device

SCRIPT = Path(__file__).parents[1] / "gpu.py"


def test_every_stage_and_every_table_is_there(tmp_path):
    command = [sys.executable, str(SCRIPT), "--scale=tiny", f"--out={tmp_path}", "--parts", "speed", "stages", "width"]
    ends = {**device.environment(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr[-3000:]
    assert report.startswith(f"# {device.NAME}, ")
    verdicts = [line for line in report.splitlines() if line.startswith("- ")]
    assert len(verdicts) == 5
    assert all(": PASS in " in line for line in verdicts)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in report.splitlines() if line.startswith("| ")}
    assert rows["FLUX.1-dev"].endswith("| 715 | 1.00 |")
    for stage in ("probe", "intervals", "select", "depth", "width", "finetune", "export", "evaluate"):
        assert f"black-forest-labs/FLUX.1-dev, {stage}" in rows
    assert not rows["black-forest-labs/FLUX.1-dev, depth"].endswith("| - |")  # `ppcl plan` has a figure


def test_a_part_that_fails_is_told_and_ends_with_status_1(tmp_path):
    command = [sys.executable, str(SCRIPT), "--scale=tiny", f"--out={tmp_path}", "--parts", "speed"]
    ends = {**device.environment(memory=2_000_000), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "- speed of SD3.5 large: FAIL: OutOfMemoryError: CUDA out of memory" in report
    assert "- speed of FLUX.1-dev: PASS" in report


def test_without_a_gpu_it_says_so_and_that_is_no_failure():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "no GPU: nothing to measure\n")
