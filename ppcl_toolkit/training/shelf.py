"""Where what learns waits on the host between its turns on the device."""

import os
from pathlib import Path
from typing import final

import torch
from torch import Tensor


@final
class Shelf:
    """Gives every tensor one place on the host: in memory up to a limit, and beyond that in files of a folder.

    A file loses its name as soon as it is mapped: the system writes its pages out when memory is short, and takes it
    away with the process, however that ends. Raises `OSError` where the disk has no room for one.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self._folder, self._left = folder, limit
        self._places: dict[str, Tensor] = {}

    def put(self, key: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the place of `key`, and return it there."""
        if key not in self._places:
            self._places[key] = self._room(tensor)
        place = self._places[key]
        assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype), f"{key} has become another tensor"
        return place if place.data_ptr() == tensor.data_ptr() else place.copy_(tensor)

    def _room(self, tensor: Tensor) -> Tensor:
        if self._folder is None or self._left is None or tensor.nbytes <= self._left:
            self._left = None if self._left is None else self._left - tensor.nbytes
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        path = self._folder / f".waiting-{os.getpid()}-{len(self._places)}"
        with path.open("wb") as file:
            # A hole that the disk cannot fill would be found when a page is written, by a signal that ends the process.
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        room = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        path.unlink()
        return room.view(tensor.shape)
