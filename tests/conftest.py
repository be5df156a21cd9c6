"""Tests import `tiny`, the models they run on, from beside this file; nothing here reaches a network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
