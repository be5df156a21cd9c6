"""A disk that keeps shapes: what the package writes is copied to the host as ever, and then only remembered."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.artifacts import storage
from ppcl_toolkit.stages import probe
from ppcl_toolkit.training import shards

Shapes = Mapping[str, tuple[Any, torch.dtype]]
_files: dict[str, tuple[Shapes, Mapping[str, str]]] = {}


def keep(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> None:
    """Remember a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    _files[_key(path)] = (dict(shapes), metadata or {"tree": _outline(shapes)})


def written() -> int:
    """Return the bytes of all tensors that lie on the disk."""
    live = {key: shapes for key, (shapes, _) in _files.items() if Path(key).exists()}
    return sum(torch.Size(shape).numel() * dtype.itemsize for own in live.values() for shape, dtype in own.values())


def replace() -> None:
    """Put this disk in place of the real one."""
    for module in (storage, shards, probe):
        module.save_file, module.safe_open = save_file, _safe_open  # type: ignore[attr-defined]
    storage._apart = lambda tensors: tensors


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Keep a file as safetensors would write it."""
    assert all(tensor.device.type == "cpu" for tensor in tensors.values()), "only what is on the host can be written"
    keep(
        path.with_name(path.name.removeprefix(".").removesuffix(".partial")),
        {n: (t.shape, t.dtype) for n, t in tensors.items()},
        metadata,
    )
    path.touch()


@contextlib.contextmanager
def _safe_open(path: Path, **_: Any) -> Iterator[Any]:
    shapes, metadata = _files[_key(path)]
    yield _Opened(shapes, metadata)


class _Opened:
    def __init__(self, shapes: Shapes, metadata: Mapping[str, str]) -> None:
        self._shapes, self._metadata = shapes, metadata

    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._shapes)

    def get_tensor(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name]
        return torch.empty(shape, dtype=dtype)


def _key(path: Path) -> str:
    return str(Path(path).resolve())


def _outline(shapes: Shapes) -> str:
    import json

    return json.dumps({"dict": {name: {"tensor": name} for name in shapes}})
