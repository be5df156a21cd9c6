"""Tests import `tiny`, the models they run on, from beside this file; nothing here reaches a network."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On some processors MKL's sums depend on where operands lie in memory, and what is read from a file lies elsewhere.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _fresh_processes():
    """Most exports are verified, and most memory measured, in processes forked from one that has imported libraries."""
    from nursery import adopt

    adopt()
