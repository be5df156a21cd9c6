"""The run directory: which stage is done, atomic results, resume.

A stage works in `<name>.partial/` and appears as `<name>/` by one rename, so what has its final name is whole. Beside
its result lies what it was made from; a finished stage is only read again by a recipe that asks for the same.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.trouble import writing

Result = TypeVar("Result")
_MADE_FROM, _WARNINGS = "made_from.json", "warnings.json"
_LOCK = ".lock"
_FIRST = {_LOCK, "environment.json", ".environment.json.partial", ".recipe.yaml.partial"}
"""What a run that is killed in its first moment leaves, or another process of the same run has just written."""


_held: dict[Path, int] = {}
"""Locks of this process, by their files: the kernel frees them with it, however it ends."""


class Progress(Protocol):
    """Where stages report: `cli.py` draws it."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `stage` are through."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


class Workspace:
    """A folder that holds one run.

    Raises `PpclError` when the folder holds something that is no run.
    """

    def __init__(self, path: str | Path, *, progress: Progress = silent) -> None:
        self.path = Path(path)
        self._progress = progress if processes.is_main() else silent
        self._at = ("start", 0, 1)
        self._after = ""
        self.warnings: list[str] = []
        """What stages had to say that a user should know, theirs or of the runs before."""
        if self.path.exists() and not self.path.is_dir():
            raise PpclError(f"{self.path} is a file; --out names a folder")
        if self.path.is_dir() and not (self.path / "recipe.yaml").exists() and _names(self.path) - _FIRST:
            raise PpclError(f"{self.path} holds something that is no run of ppcl; choose another --out")

    @property
    def is_begun(self) -> bool:
        """Whether a run has begun here before."""
        return (self.path / "recipe.yaml").exists()

    def open(self, recipe: str) -> None:
        """Make the folder, and note what was asked and on what; an earlier note stays until `close`.

        Until then, or the end of this process, no other one may work here: it gets a `PpclError` that names this one.
        """
        if processes.is_main():
            self.lock()
        if processes.is_main() and not (self.path / "recipe.yaml").exists():
            self._describe(recipe)
        processes.watch()
        self._wait()

    def close(self, recipe: str) -> None:
        """Note what all stages were made from; the processes of the run part here."""
        if processes.is_main():
            self._describe(recipe)
            self.unlock()
        processes.part()

    def lock(self) -> None:
        """Keep other processes out of this folder, which is made; where another is at work it is a `PpclError`."""
        path = self.path.resolve() / _LOCK
        if path in _held:
            return
        with writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise PpclError(
                f"{holder} is at work in {self.path}; wait for it, end it, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            os.close(file)
            return
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        _held[path] = file

    def unlock(self) -> None:
        """Let other processes in."""
        if (file := _held.pop(self.path.resolve() / _LOCK, None)) is not None:
            os.ftruncate(file, 0)
            os.close(file)

    def _tell(self, stage: str, done: int, total: int, note: str = "") -> None:
        self._at = (stage, done, total)
        processes.tell(f"{stage} {done}/{total}")
        self._progress(stage, done, total, note)

    def _wait(self) -> None:
        processes.wait(lambda said: self._progress(*self._at, said))

    def _describe(self, recipe: str) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "environment.json", _environment())
            write_text(self.path / "recipe.yaml", recipe)

    def stage(
        self,
        name: str,
        settings: BaseModel | Mapping[str, Any],
        make: Callable[[Desk], Sequence[str] | None],
        load: Callable[[Path], Result],
        *,
        together: bool = False,
    ) -> Result:
        """Return `load(folder)`, after `make(desk)` where this stage is not done yet.

        `make` may find its own earlier files on the desk: what a killed run left of the same settings. What it returns
        are warnings, which stay with the result. Results depend on `settings` and on the stages before, by digest.
        Raises `PpclError` with the differing keys when a finished stage was made from other settings. Of several
        processes one makes, unless they work `together`.
        """
        asked = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
        made_from = {"settings": asked, "after": self._after}
        final, partial = self.path / name, self.path / f"{name}.partial"
        if final.exists():
            self._check(name, _read_json(final / _MADE_FROM), made_from)
            self._note(name, "found")
        else:
            started = time.monotonic()
            self._prepare(name, made_from, partial)
            if together or processes.is_main():
                with writing(partial):
                    said = make(Desk(partial, functools.partial(self._tell, name)))
                    said = processes.gathered(said or ()) if together else said
                    if said and processes.is_main():
                        write_json(partial / _WARNINGS, list(said))
            self._wait()
            self._finish(name, partial, final, seconds=round(time.monotonic() - started, 3))
        self.warnings += _read_json(final / _WARNINGS) or []
        self._after = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        try:
            return load(final)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise PpclError(f"{final} is damaged ({error}); delete it to make it again") from error

    def _prepare(self, name: str, made_from: Mapping[str, Any], partial: Path) -> None:
        if processes.is_main():
            with writing(partial):
                if partial.exists() and _read_json(partial / _MADE_FROM) != made_from:
                    shutil.rmtree(partial)
                partial.mkdir(parents=True, exist_ok=True)
                write_json(partial / _MADE_FROM, made_from)
            self._note(name, "started")
        self._wait()

    def _finish(self, name: str, partial: Path, final: Path, **facts: Any) -> None:
        if processes.is_main():
            partial.rename(final)
            self._note(name, "finished", **facts)
        self._wait()

    def _check(self, name: str, found: Any, wanted: Mapping[str, Any]) -> None:
        if found is None:
            raise PpclError(f"{self.path / name} has lost its {_MADE_FROM}; delete that folder to make it again")
        differences = list(_differences(found["settings"], wanted["settings"], name))
        if differences:
            raise PpclError(
                f"stage {name!r} in {self.path} is finished with other settings: {'; '.join(differences)}. "
                f"Use another --out, or delete {self.path / name}"
            )
        if found["after"] != wanted["after"]:
            raise PpclError(
                f"stage {name!r} in {self.path} was made from an earlier stage that has changed since; "
                f"delete {self.path / name} to make it again"
            )

    def _note(self, stage: str, event: str, **facts: Any) -> None:
        if not processes.is_main():
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": stage, "event": event, **facts}
        with writing(self.path), (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _differences(found: Any, wanted: Any, path: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{path}.{key}")
    elif found != wanted:
        yield f"{path} was {json.dumps(found)}, is {json.dumps(wanted)}"


def _environment() -> dict[str, Any]:
    packages = ("ppcl-toolkit", "torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
