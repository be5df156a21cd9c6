"""Fine-tuning in little memory, on the pretended device."""

import subprocess
import sys
from pathlib import Path

import device


def test_lean_training():
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("lean.py")), "-p", "no:cacheprovider"]
    ends = {**device.environment(1, memory=300_000_000), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
