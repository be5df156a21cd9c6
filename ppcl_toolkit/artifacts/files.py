"""Files that appear whole or not at all, and what they were when they were made: names, sizes and SHA-256."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt

from ppcl_toolkit import processes
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.records import read_record

RECORD = "made_from.json"
"""File of a stage's folder that says what it was made from, and lists the others."""
MANIFEST = "manifest.json"
"""File of a variant's folder that lists the others."""
CARD = "README.md"
"""The one file of a variant that its owner may edit."""
_NOTES = ".sums-*"
"""Of a stage at work, one a process: SHA-256 of files that were hashed when they were written."""
_READERS = 4


class Entry(BaseModel):
    """A file as it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: NonNegativeInt
    """Bytes."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _inside(name: str) -> str:
    """Return the path of a file in a folder; a `ValueError` for one that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name[:100]!r} is no file of this folder")
    return name


Files = dict[Annotated[str, AfterValidator(_inside)], Entry]
"""Files of a folder by their paths in it, with slashes."""


class Manifest(BaseModel):
    """What `manifest.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    files: Files


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    put(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def put(partial: Path, path: Path) -> None:
    """Give a file or folder its name: both it and its name are on the disk when this returns."""
    if partial.is_file():
        sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if path.is_file():
            raise  # folders cannot be synced everywhere
    finally:
        os.close(opened)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note(path: Path) -> None:
    """Hash a file that a stage has just written, while the system has it in memory, for `listed` of its folder."""
    if not (path.parent / RECORD).exists():
        return
    found = path.stat()
    line = json.dumps([path.name, found.st_size, found.st_mtime_ns, digest(path)])
    with (path.parent / _NOTES.replace("*", str(processes.world()[0]))).open("a") as file:
        file.write(f"{line}\n")


def listed(folder: Path, *without: str) -> Files:
    """Return all files below a folder but those `without`, hidden and temporary ones; what was noted is not read."""
    known = {path: noted for notes in folder.rglob(_NOTES) for path, noted in _noted(notes)}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_temporary(path)]
    names = [path.relative_to(folder).as_posix() for path in paths]

    def entry(path: Path) -> Entry:
        found = path.stat()
        size, time, sha256 = known.get(path, (None, None, ""))
        same = (size, time) == (found.st_size, found.st_mtime_ns)
        return Entry(size=found.st_size, sha256=sha256 if same else digest(path))

    chosen = [(name, path) for name, path in zip(names, paths, strict=True) if name not in without]
    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip((name for name, _ in chosen), readers.map(entry, (path for _, path in chosen)), strict=True))


def is_temporary(path: Path) -> bool:
    """Whether a file of a stage is none of its results: what it notes for itself, or left when it was killed."""
    return path.name.startswith(".") or path.suffix in (".tmp", ".partial")


def damage(folder: Path, files: Mapping[str, Entry], *, most: float = float("inf")) -> dict[str, str]:
    """Return the files that are not as they were made, and what is wrong with each.

    Names and sizes are compared always, SHA-256 where all files together have at most `most` bytes.
    """
    wrong = {}
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            wrong[name] = "is missing"
        elif (size := path.stat().st_size) != entry.size:
            wrong[name] = f"has {size:,} bytes instead of {entry.size:,}"
    left = {name: entry for name, entry in files.items() if name not in wrong}
    if sum(entry.size for entry in files.values()) <= most:
        with ThreadPoolExecutor(_READERS) as readers:
            found = readers.map(lambda name: _matches(folder / name, left[name]), left)
            wrong |= {name: _CHANGED for name, same in zip(left, found, strict=True) if not same}
    return wrong


_CHANGED = "has other content than when it was made (SHA-256)"


def told(wrong: Mapping[str, str]) -> str:
    """Say in one sentence what `damage` found."""
    first = "; ".join(f"{name} {what}" for name, what in [*wrong.items()][:3])
    return first + (f"; and {len(wrong) - 3:,} more files" if len(wrong) > 3 else "")


@final
class Checked:
    """Raises `PpclError` for a file that is not as it was made, when it is about to be read for the first time."""

    def __init__(self, files: Mapping[str, Entry] | None) -> None:
        self._left = dict(files or {})

    def __call__(self, path: Path) -> None:
        """Hash a file, if it is known and was not hashed yet."""
        entry = self._left.get(path.name)
        if entry is not None and not _matches(path, entry):
            raise PpclError(f"{path} {_CHANGED}; the same command with --remake makes it again")
        self._left.pop(path.name, None)


def write_manifest(folder: Path) -> None:
    """List the files of a variant in it, but for its model card."""
    write_text(folder / MANIFEST, Manifest(files=listed(folder, MANIFEST, CARD)).model_dump_json(indent=1) + "\n")


def read_manifest(folder: Path) -> Files | None:
    """Return what a variant lists, None where there is no manifest; a broken one is a `PpclError`."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest: Manifest = read_record(path, Manifest)
    return manifest.files


def _noted(notes: Path) -> Iterator[tuple[Path, tuple[int, int, str]]]:
    for line in notes.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a killed process leaves half a line
            name, size, time, sha256 = json.loads(line)
            yield notes.with_name(name), (size, time, sha256)


def _matches(path: Path, entry: Entry) -> bool:
    try:
        return digest(path) == entry.sha256
    except OSError:  # a disk that cannot read a file any more has damaged it
        return False
