"""Runs in children of one process that has imported everything: each starts in no time, and dies as a process does."""

import contextlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from nursery import Nursery, forked
from safetensors import SafetensorError

from ppcl_toolkit import Recipe, compress
from ppcl_toolkit.artifacts import workspace
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.trouble import explained


class Child:
    """A forked process at work on `function(tell)`: what it tells, and how it ends.

    `done`, with what the function returned; `refused`, with the one sentence; `traceback`, a mistake; `killed`; `hung`.
    """

    def __init__(self, function: Callable[[Callable[..., None]], Any], log: Path, **variables: str) -> None:
        self._pipe, out = os.pipe()
        self._text = ""
        self.end: tuple[str, Any] | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(variables)
            os.close(self._pipe)
            quiet = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            write = lambda *line: os.write(out, (json.dumps(line) + "\n").encode())  # noqa: E731
            write(*_outcome(lambda: function(lambda *told: write("told", told))))
            os._exit(0)
        os.close(out)

    def told(self, seconds: float) -> list[Any]:
        """Return what it tells within so many seconds; nothing more where it has ended."""
        if self.end is not None or not select.select([self._pipe], [], [], max(seconds, 0))[0]:
            return []
        found = os.read(self._pipe, 1 << 16).decode()
        *lines, self._text = (self._text + found).split("\n")
        told = [json.loads(line) for line in lines]
        if last := next((line for line in told if line[0] != "told"), None):
            self._close(last[0], last[1])
        elif not found:
            self._close("killed", "")
        return [line[1] for line in told if line[0] == "told"]

    def wait(self, seconds: float = 1800) -> tuple[str, Any]:
        """Return how it ends; one that does not is killed, and `hung`."""
        until = time.monotonic() + seconds
        while self.end is None and time.monotonic() < until:
            self.told(until - time.monotonic())
        if self.end is None:
            os.kill(self.pid, signal.SIGKILL)
            self._close("hung", f"for {seconds:.0f} s")
        assert self.end is not None
        return self.end

    def kill(self) -> None:
        """End it as a power failure does."""
        if self.end is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def _close(self, how: str, what: Any) -> None:
        self.end = how, what
        os.waitpid(self.pid, 0)
        os.close(self._pipe)


def _outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", work()
    except PpclError as error:
        return "refused", str(error)
    except BaseException as error:
        known = explained(error)
        return ("refused", str(known)) if known else ("traceback", f"{type(error).__name__}: {error}"[:1000])


def running(
    recipe: Path, out: Path, *, ranks: int = 1, full: tuple[str, int] | None = None, **options: Any
) -> list[Child]:
    """Start `compress` in `out` by so many processes; the disk is full after so many files of a stage, `full`.

    What is `done` are the number of files that each stage writes, and all modules that are imported.
    """

    def work(tell: Callable[..., None]) -> dict[str, Any]:
        subprocess.run = Nursery(forked).run  # type: ignore[assignment]
        workspace.silent = tell
        disk = Disk(out, full)

        def progress(stage: str, *told: Any, **note: Any) -> None:
            disk.enter(stage.split("/")[0])
            tell(stage, *told, *note.values())

        with filling(disk):
            compress(Recipe.load(recipe), out, progress=progress, **options)
        return {"files": disk.files, "modules": [*sys.modules]}

    if ranks == 1:
        return [Child(work, out.with_suffix(".log"))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    return [Child(work, out.with_suffix(".log"), **shared, **place) for place in places]


class Disk:
    """A disk with room for so many more files of a stage, and none from there on."""

    def __init__(self, folder: Path, full: tuple[str, int] | None) -> None:
        self.files = Counter[str]()
        self._folder, self._full, self._stage, self._is_full = str(folder), full, "start", False

    def enter(self, stage: str) -> None:
        """From here on, what is written is of this stage."""
        self._stage = stage

    def fill(self, path: Any) -> None:
        """Take the room of a file; without any it is ENOSPC."""
        if str(path).startswith(self._folder):
            self.files[self._stage] += 1
            self._is_full |= self._full is not None and self._full[0] == self._stage and self._room() < 0
            if self._is_full:
                raise OSError(28, "No space left on device", str(path))

    def _room(self) -> int:
        return self._full[1] - self.files[self._stage] if self._full else 0


@contextlib.contextmanager
def filling(disk: Disk) -> Iterator[None]:
    """Let everything that writes take the room of a disk."""
    own, tensors, mkdir = io.open, safetensors.torch.serialize_file, os.mkdir

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            disk.fill(file)
        return own(file, mode, *args, **kwargs)

    def written(tensor: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        try:
            disk.fill(path)
        except OSError as error:  # as the library says it
            Path(path).touch()
            raise SafetensorError(f"I/O error: {error.strerror} (os error 28)") from None
        tensors(tensor, path, *args, **kwargs)

    def made(path: Any, *args: Any, **kwargs: Any) -> None:
        disk.fill(path)
        mkdir(path, *args, **kwargs)

    io.open, safetensors.torch.serialize_file, os.mkdir = opened, written, made  # type: ignore[assignment]
    try:
        yield
    finally:
        io.open, safetensors.torch.serialize_file, os.mkdir = own, tensors, mkdir
