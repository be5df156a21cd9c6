"""The torture of `make torture` runs, and finds nothing in a few trials."""

import subprocess
import sys
from pathlib import Path


def test_a_few_trials_of_each_kind_find_nothing():
    script = Path(__file__).with_name("torture.py")
    options = ["--minutes", "30", "--seed", "1", "--most", "1", "--only", "kills", "damage", "mutants"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    told = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "1 kills" in told["kills"] and "1 bit-identical" in told["kills"]
    assert "1 files damaged" in told["damage"] and "refused" in told["mutants"]
