"""The README's commands work in any order: what one leaves behind is no matter to another."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_style_is_the_same_before_and_after_a_run(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "tests"]
    for folder in (None, "runs", "tiny"):
        if folder:
            (tmp_path / folder).mkdir()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
