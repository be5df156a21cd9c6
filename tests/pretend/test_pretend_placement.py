"""What lives where, on a device with a limit."""

import re
import subprocess
import sys
from pathlib import Path

import device


def test_pipelines_are_called_on_devices_of_any_size():
    checks = Path(__file__).with_name("placement_checks.py")
    command = [sys.executable, "-m", "pytest", str(checks), "-p", "no:cacheprovider"]
    ends = {**device.environment(memory=200_000_000), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^[.]{11}\s", done.stdout, flags=re.M), done.stdout
