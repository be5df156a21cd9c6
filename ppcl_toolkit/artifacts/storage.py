"""Tensors on disk: nested values as one safetensors file, and the bank of trained blocks. Nothing is pickled."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppcl_toolkit.artifacts.files import is_temporary, note, put
from ppcl_toolkit.errors import PpclError


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a stage works: its folder, and whom it tells how far it is, `progress(done, total, note="")`."""

    folder: Path
    progress: Callable[..., None]


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and JSON values as one safetensors file, by rename."""
    tensors: dict[str, Tensor] = {}
    outline = _outline(tree, tensors, "")
    stored = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    save_tensors(path, stored, {"tree": json.dumps(outline)})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by rename, and note its SHA-256 for the record of its stage; states are not hashed."""
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata)
    put(partial, path)
    if not is_temporary(path):
        note(path)


def load_tree(path: Path, rows: slice | None = None) -> Any:
    """Read what `save_tree` wrote, or those `rows` of a list alone.

    A truncated or foreign file is a `PpclError` that names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            outline = json.loads((file.metadata() or {})["tree"])
            if rows is not None:
                outline = {"list": outline["list"][rows]}
            # What several share is one tensor again.
            return _restored(outline, functools.cache(file.get_tensor))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise PpclError(f"{path} is damaged or not a file of this run ({error}); delete it and run again") from error


class Bank(Mapping[str, dict[str, Tensor]]):
    """Trained blocks by `Form.key`, each the state dict of a student block, one file a block."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self._files = {
            path.name.removesuffix(".safetensors"): path for f in folders for path in f.glob("*.safetensors")
        }

    def joined(self, *folders: Path) -> "Bank":
        """Return a bank that holds what lies in `folders`, too."""
        return Bank(*self.folders, *folders)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = load_tree(self._files[key])
        return state

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier one, as tied weights do: the format refuses them."""
    ends: dict[int, int] = {}
    apart = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        storage, start = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        apart[name] = tensor.clone() if start < ends.get(storage, 0) else tensor
        ends[storage] = max(ends.get(storage, 0), start + tensor.nbytes)
    return apart


def _outline(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        # What several samples share is written once.
        known = next((name for name, tensor in tensors.items() if tensor is value), None)
        tensors.setdefault(known or path, value)
        return {"tensor": known or path}
    if isinstance(value, Mapping):
        return {"dict": {key: _outline(item, tensors, f"{path}/{key}") for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_outline(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    assert value is None or isinstance(value, bool | int | float | str), f"{path}: a {type(value).__name__} on disk"
    return {"value": value}


def _restored(outline: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Any:
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: _restored(item, tensor) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_restored(item, tensor) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
