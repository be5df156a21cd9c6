"""Tests import `tiny`, the models they run on, from beside this file; nothing here reaches a network."""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On some processors MKL's sums depend on where operands lie in memory, and what is read from a file lies elsewhere.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _fresh_processes():
    """Exports are verified, and memory is measured, in processes forked from one that has imported libraries alone.

    Those that commands and scripts of tests start are new ones, imports and all.
    """
    from nursery import Nursery, started

    from ppcl_toolkit.artifacts import variant
    from ppcl_toolkit.stages import evaluate

    lazy = SimpleNamespace(run=lambda *args, **given: nursery().run(*args, **given))
    nursery = functools.cache(lambda: Nursery(started))
    with pytest.MonkeyPatch.context() as patch:
        for module in (variant, evaluate):
            patch.setattr(module, "subprocess", lazy)
        yield
