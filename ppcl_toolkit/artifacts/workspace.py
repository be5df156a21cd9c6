"""The run directory: which stage is done, atomic results, resume.

A stage works in `<name>.partial/` and appears as `<name>/` by one rename, so what has its final name is whole. Beside
its result lies what it was made from; a finished stage is only read again by a recipe that asks for the same.
"""

import copy
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
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

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
    """Where stages report: `console.py` draws it."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `stage` are through."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


class Job(NamedTuple, Generic[Result]):
    """A stage that is to be made, or only read where it is done."""

    name: str
    made_from: Mapping[str, Any]
    make: Callable[[Desk], Sequence[str] | None]
    load: Callable[[Path], Result]


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
        Raises `PpclError` where the processes of the run do not share the folder, too.
        """
        if processes.is_main():
            self.lock()
        if processes.is_main() and not (self.path / "recipe.yaml").exists():
            self._describe(recipe)
        processes.watch()
        self._wait()
        with writing(self.path):
            processes.check_shared(self.path)

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

    def branch(self) -> "Workspace":
        """Return this run again: stages of the branch need those made so far, and none that others branch off."""
        return copy.copy(self)

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
        (result,) = self.results([self.job(name, settings, make, load)], together=together)
        return result

    def job(
        self,
        name: str,
        settings: BaseModel | Mapping[str, Any],
        make: Callable[[Desk], Sequence[str] | None],
        load: Callable[[Path], Result],
    ) -> Job[Result]:
        """Return a stage for `results`; stages after this one depend on it, whenever it is made."""
        asked = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
        job = Job(name, {"settings": asked, "after": self._after}, make, load)
        self._after = hashlib.sha256(json.dumps(job.made_from, sort_keys=True).encode()).hexdigest()
        return job

    def results(self, jobs: Sequence[Job[Result]], *, together: bool = False) -> list[Result]:
        """Return the results of stages that need nothing of each other: processes share those that are not done yet."""
        rank, count = processes.world()
        left = [job for job in jobs if not self._is_done(job)]
        started = time.monotonic()
        self._prepare(left)
        for number, job in enumerate(left):
            if together or number % count == rank:
                self._make(job, together=together)
        self._finish(left, started)
        return [self._read(job) for job in jobs]

    def _is_done(self, job: Job[Any]) -> bool:
        final = self.path / job.name
        if not final.exists():
            return False
        self._check(job.name, _read_json(final / _MADE_FROM), job.made_from)
        self._note(job.name, "found")
        return True

    def _prepare(self, jobs: Sequence[Job[Any]]) -> None:
        for job in jobs if processes.is_main() else ():
            partial = self._partial(job)
            with writing(partial):
                if partial.exists() and _read_json(partial / _MADE_FROM) != job.made_from:
                    shutil.rmtree(partial)
                partial.mkdir(parents=True, exist_ok=True)
                write_json(partial / _MADE_FROM, job.made_from)
            self._note(job.name, "started")
        if jobs:
            self._wait()

    def _make(self, job: Job[Any], *, together: bool) -> None:
        partial = self._partial(job)
        with writing(partial):
            said = job.make(Desk(partial, functools.partial(self._tell, job.name)))
            said = processes.gathered(said or ()) if together else said
            if said and (processes.is_main() or not together):
                write_json(partial / _WARNINGS, list(said))

    def _finish(self, jobs: Sequence[Job[Any]], started: float) -> None:
        if jobs:
            self._wait()
        for job in jobs if processes.is_main() else ():
            self._partial(job).rename(self.path / job.name)
            self._note(job.name, "finished", seconds=round(time.monotonic() - started, 3))
        if jobs:
            self._wait()

    def _read(self, job: Job[Result]) -> Result:
        final = self.path / job.name
        self.warnings += _read_json(final / _WARNINGS) or []
        try:
            return job.load(final)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise PpclError(f"{final} is damaged ({error}); delete it to make it again") from error

    def _partial(self, job: Job[Any]) -> Path:
        return self.path / f"{job.name}.partial"

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
