"""Families are as others on the pretended device; `family_checks.py` is what a process that has it runs."""

import re
import subprocess
import sys
from pathlib import Path

import device

from ppcl_toolkit.adapter import available_adapters


def test_every_family_runs_on_the_device_as_on_the_cpu():
    checks = Path(__file__).with_name("family_checks.py")
    command = [sys.executable, "-m", "pytest", str(checks), "-p", "no:cacheprovider", "-q"]
    ends = {**device.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"^[.]{{{2 * len(available_adapters())}}}\s", done.stdout, flags=re.M), done.stdout
