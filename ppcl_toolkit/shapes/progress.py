"""What every training phase shares: checkpoints that survive a kill, the learning-rate shape, the log."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppcl_toolkit.artifacts.storage import load_tree, save_tree

log = logging.getLogger("ppcl.shapes")


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that a kill at any moment leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tree(path, state)


def load_if_there(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path` on the CPU, mapped from its file, or None."""
    return _numbered(load_tree(path)) if path.exists() else None


def _numbered(tree: Any) -> Any:
    """Give the states of optimizers their numbers again: in JSON every key is a text."""
    if isinstance(tree, list):
        return [_numbered(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdecimal() else key: _numbered(value) for key, value in tree.items()}


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line to `path` and log it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    log.info(" ".join(f"{key} {value}" for key, value in row.items()))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def warmup_stable_decay(done: float, total: float, *, warmup: float = 0.01, decay: float = 0.25) -> float:
    """Learning-rate factor after `done` of `total` samples: linear up, constant, then linear down to 0."""
    share = min(done / total, 1.0)
    if share < warmup:
        return share / warmup
    if share < 1 - decay:
        return 1.0
    return (1 - share) / decay


def ready(device: str) -> torch.device:
    """The device to train on; "auto" is CUDA where there is one. Under torchrun, join the other processes."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)
