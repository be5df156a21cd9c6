"""The run directory: which stage is done, atomic results, resume.

A stage works in `<name>.partial/` and appears as `<name>/` by one rename, so what has its final name is whole. Beside
its result lies its record, `made_from.json`: what it was asked for, what the stages before it had made, and the size
and SHA-256 of each of its files. A finished stage is only read again by a recipe that asks for the same, and where its
files are what they were: at every start names and sizes are compared, and SHA-256 of stages of up to 32 GB; samples and
fine-tuning targets are hashed when they are first read, too, and `ppcl verify` hashes everything.
"""

import copy
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.files import RECORD, damage, is_temporary, listed, put, told, write_json, write_text
from ppcl_toolkit.artifacts.record import Record, differences, digest_of
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.records import read_record
from ppcl_toolkit.trouble import writing

Result = TypeVar("Result")
_WARNINGS = "warnings.json"
_HASHED = 32 * 10**9
"""Bytes of a stage that are hashed at every start."""
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
    pieces: bool = False
    """Whether each file is made by itself: of a damaged stage, `make` may keep those that are as they were."""
    beside: Callable[[Path, float], Mapping[str, str]] = lambda *_: {}
    """What is damaged of what was made outside the stage's folder, as `damage` says it of up to so many bytes."""


class Workspace:
    """A folder that holds one run.

    With `remake`, what is damaged is made again, and what depends on it where that comes out otherwise; without
    `verify`, names and sizes of files are compared, and SHA-256 is not.
    Raises `PpclError` when the folder holds something that is no run.
    """

    def __init__(
        self, path: str | Path, *, progress: Progress = silent, remake: bool = False, verify: bool = True
    ) -> None:
        self.path, self.verifies = Path(path), verify
        self._remake, self._hashed = remake, float("inf") if remake else _HASHED if verify else -1
        self._made: dict[str, str] = {}
        """Digests of what the stages so far have made."""
        self._progress = progress if processes.is_main() else silent
        self._at = ("start", 0, 1)
        self._after = ""
        self.warnings: list[str] = []
        """What stages had to say that a user should know, theirs or of the runs before."""
        if self.path.exists() and not self.path.is_dir():
            raise PpclError(f"{self.path} is a file; --out names a folder")
        if self.path.is_dir() and not (self.path / "recipe.yaml").exists() and _names(self.path) - _FIRST:
            raise PpclError(f"{self.path} holds something that is no run of ppcl: no recipe.yaml; choose another --out")

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
            for left in self.path.glob("variants/*.partial"):  # of a run that was killed while it exported
                shutil.rmtree(left, ignore_errors=True)
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
        try:
            path = self.path.resolve() / _LOCK
            if path in _held:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (OSError, RuntimeError) as error:  # the second for links that lead in a circle
            raise PpclError(f"cannot work in {self.path}: {getattr(error, 'strerror', None) or error}") from error
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
        pieces: bool = False,
    ) -> Result:
        """Return `load(folder)`, after `make(desk)` where this stage is not done yet.

        `make` may find its own earlier files on the desk: what a killed run left of the same settings. What it returns
        are warnings, which stay with the result. Results depend on `settings` and on the stages before, by digest.
        Raises `PpclError` with the differing keys when a finished stage was made from other settings, and with the
        files that are not as it made them. Of several processes one makes, unless they work `together`. For `pieces`
        see `Job`.
        """
        job = self.job(name, settings, make, load)._replace(pieces=pieces)
        (result,) = self.results([job], together=together)
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
        self._after = digest_of(job.made_from)
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

    def check(self, *names: str) -> None:
        """Raise `PpclError` where finished stages are not what they were; those that are not there are passed over."""
        for name in names:
            if (folder := self.path / name).is_dir():
                self._refuse(name, damage(folder, Record.of(folder).files or {}, most=self._hashed))

    def discard(self, name: str) -> None:
        """Delete the files of a stage that have served; its record stays, and expects no more of them."""
        folder = self.path / name
        if processes.is_main() and folder.is_dir():
            with writing(folder):
                spent = Record.of(folder).model_copy(update={"files": None})
                write_json(folder / RECORD, spent.sealed().model_dump())
                for path in [path for path in folder.iterdir() if path.name != RECORD]:
                    path.unlink()

    def _is_done(self, job: Job[Any]) -> bool:
        done, error = False, None
        if processes.is_main():
            try:
                done = self._is_whole(job)
            except PpclError as caught:  # all processes are to end by it, and none to wait for this one
                error = caught
        processes.wait()
        done, error = processes.agreed((done, error))
        if error is not None:
            raise error
        if done:
            self._note(job.name, "found")
        return done

    def _is_whole(self, job: Job[Any]) -> bool:
        """Whether a stage is done; one that is damaged becomes one that is not, or a `PpclError`."""
        final, partial = self.path / job.name, self._partial(job)
        if not final.exists() and self._goes_on(partial, job) and self._was_closed(partial):
            put(partial, final)  # the run was killed just before it
        if not final.exists():
            return False
        try:
            record = Record.of(final)
        except PpclError as error:
            self._refuse(job.name, {"": str(error)})
            self._reopen(job, {RECORD: "is damaged"})
            return False
        self._check(job.name, record, job.made_from)
        wrong = damage(final, record.files or {}, most=self._hashed)
        wrong |= job.beside(final, self._hashed) if record.files is not None and not wrong else {}
        self._refuse(job.name, wrong)
        others = record.changed(self._made)
        if others and not self._remake:
            raise PpclError(
                f"stage {job.name!r} in {self.path} was made from another {others[0]!r} than there is now; the same "
                f"command with --remake makes it again"
            )
        if wrong or others:
            self._reopen(job, {RECORD: "is of another run"} if others else wrong)
        elif record.digest is not None:
            self._made[job.name] = record.digest
        return not wrong and not others

    def _refuse(self, name: str, wrong: Mapping[str, str]) -> None:
        if wrong and not self._remake:
            raise PpclError(
                f"stage {name!r} in {self.path} is damaged: {told(wrong).strip()}; the same command with --remake "
                "makes it again, and what depends on it"
            )

    def _reopen(self, job: Job[Any], wrong: Mapping[str, str]) -> None:
        """Make a finished stage one that is not; of pieces, those that are as they were stay."""
        final, partial = self.path / job.name, self._partial(job)
        with writing(partial):
            # A stage without its record is damaged, whatever else is left of it, and is not continued.
            for name in wrong if job.pieces and RECORD not in wrong else (RECORD,):
                (final / name).unlink(missing_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            put(final, partial)
        self._note(job.name, "damaged", files=len(wrong))

    def _prepare(self, jobs: Sequence[Job[Any]]) -> None:
        for job in jobs if processes.is_main() else ():
            partial = self._partial(job)
            with writing(partial):
                if partial.exists() and not self._goes_on(partial, job):
                    shutil.rmtree(partial)
                partial.mkdir(parents=True, exist_ok=True)
                write_json(partial / RECORD, {**job.made_from, "before": self._made})
            self._note(job.name, "started")
        if jobs:
            self._wait()

    def _goes_on(self, partial: Path, job: Job[Any]) -> bool:
        """Whether what a killed run left is of the same settings and the same stages before."""
        try:
            found = Record.of(partial)
        except PpclError:
            return False
        same = (found.settings, found.after) == (job.made_from["settings"], job.made_from["after"])
        return same and not found.changed(self._made)

    def _was_closed(self, partial: Path) -> bool:
        files = Record.of(partial).files
        return files is not None and not damage(partial, files, most=self._hashed)

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
        before = dict(self._made)
        for job in jobs if processes.is_main() else ():
            self._close(job, before)
            self._note(job.name, "finished", seconds=round(time.monotonic() - started, 3))
        if jobs:
            self._wait()

    def _close(self, job: Job[Any], before: Mapping[str, str]) -> None:
        """Record what a stage has made, and give it its name."""
        partial = self._partial(job)
        with writing(partial):
            record = Record(**{**job.made_from, "before": before, "files": listed(partial, RECORD)})
            for path in [path for path in partial.rglob("*") if path.is_file() and is_temporary(path)]:
                path.unlink()
            write_json(partial / RECORD, record.sealed().model_dump())
            put(partial, self.path / job.name)
        assert record.digest is not None
        self._made[job.name] = record.digest

    def _read(self, job: Job[Result]) -> Result:
        final = self.path / job.name
        try:
            said: list[str] = read_record(final / _WARNINGS, list[str]) if (final / _WARNINGS).exists() else []
            self.warnings += said
            return job.load(final)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PpclError(f"{final} is damaged ({error}); delete it to make it again") from error

    def _partial(self, job: Job[Any]) -> Path:
        return self.path / f"{job.name}.partial"

    def _check(self, name: str, found: Record, wanted: Mapping[str, Any]) -> None:
        if unlike := list(differences(found.settings, wanted["settings"], name)):
            raise PpclError(
                f"stage {name!r} in {self.path} is finished with other settings: {'; '.join(unlike)}. "
                f"Use another --out, or delete {self.path / name}"
            )
        if found.after != wanted["after"]:
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


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _environment() -> dict[str, Any]:
    packages = ("ppcl-toolkit", "torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
