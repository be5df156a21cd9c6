"""Which teacher a run was made from: a hub id with its commit, or a folder with a digest of all that is loaded of it.

Folders are hashed once: a run keeps what it hashed, by size and time of each file. With which adapter, too.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.artifacts.files import digest, write_text
from ppcl_toolkit.artifacts.record import Record, differences, digest_of
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.records import read_record
from ppcl_toolkit.values import shortened

NOTES = "teacher.json"
"""File of a run: the SHA-256 of every file of its teacher."""
_READERS = 4
_PLANNED = ("models", "others", "dtype", "example")
"""Of an adapter, for `ppcl plan` alone: no result depends on it."""
_TOP = ("model_index.json", "plan.json", "block_calls.json")


class Notes(BaseModel):
    """What `teacher.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, tuple[int, int, str]]
    """By path: bytes, time of the last change in nanoseconds, SHA-256."""
    sha256: str
    """Of all that."""


def identity(path: str, folder: str, notes: Path | None = None) -> str:
    """Return what tells the teacher in `folder` from all others; `path` is what the recipe calls it.

    A snapshot of the hub is told by its commit, any other folder by the SHA-256 of all files of its parts. What `notes`
    has of files of the same size and time is not read again.
    """
    place = Path(folder)
    if path != folder and place.parent.name == "snapshots":
        return f"{path}@{place.name}"
    known, paths = _known(notes), list(_files(place))

    def entry(file: Path) -> tuple[int, int, str]:
        found = file.stat()
        size, time, sha256 = known.get(str(file), (None, None, ""))
        same = (size, time) == (found.st_size, found.st_mtime_ns)
        return found.st_size, found.st_mtime_ns, sha256 if same else digest(file)

    try:
        with ThreadPoolExecutor(_READERS) as readers:
            hashed = dict(zip(map(str, paths), readers.map(entry, paths), strict=True))
    except OSError as error:
        raise PpclError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    if notes is not None and hashed != known and notes.parent.is_dir():
        write_text(notes, Notes(files=hashed, sha256=digest_of(_plain(hashed))).model_dump_json(indent=1) + "\n")
    content = {file.relative_to(place).as_posix(): hashed[str(file)][2] for file in paths}
    return f"{path}#{digest_of(content)}"


def early_identity(path: str, folder: str, revision: str | None) -> str:
    """Return what runs of earlier versions know a teacher by: no commit, and of a folder only the transformer's heads.

    Sizes, and the first mebibyte of every file.
    """
    if not Path(path).is_dir() and path != "shapes":
        return f"{path}@{revision or 'main'}"
    found = hashlib.sha256()
    for file in sorted((Path(folder) / "transformer").rglob("*")):
        if file.is_file():
            found.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                found.update(opened.read(1 << 20))
    return f"{path}#{found.hexdigest()[:16]}"


def source_of(run: Path) -> str | None:
    """Return the teacher by which a run was begun; None where that is not known yet, or not any more."""
    for folder in (run / "samples", run / "samples.partial", run / "check"):
        source = _noted(folder, "source")
        if source is not None:
            return source if isinstance(source, str) else None
    return None


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """Return what results depend on of an adapter, as plain data: what is not by default, functions by their code."""
    found: dict[str, Any] = _facts(adapter)
    return {name: value for name, value in found.items() if name not in _PLANNED}


def asked_of_check(run: Path, source: str, adapter: Adapter) -> dict[str, Any]:
    """Return by what the stage `check` of a run is known: teacher and, but in runs of earlier versions, adapter.

    Raises `PpclError` where the run was begun with others: its stages were made with those.
    """
    if (teacher := source_of(run)) not in (None, source):
        raise PpclError(f"{run} was made from the teacher {teacher}, and that is {source} now; use another --out")
    facts, known = facts_of(adapter), _noted(run / "check", "adapter")
    if known is None and _noted(run / "check", "source") is not None:
        return {"source": source}
    if known is not None and (unlike := [*differences(known, facts, "adapter")]):
        said = "; ".join(shortened(each)[1:-1] for each in unlike[:3])
        raise PpclError(f"{run} was made with another adapter {adapter.family!r}: {said}; use another --out")
    return {"source": source, "adapter": facts}


def _noted(folder: Path, key: str) -> Any:
    try:
        return Record.of(folder).settings.get(key)
    except PpclError:  # the stage itself says so
        return None


def _facts(value: Any) -> Any:
    if is_dataclass(value):
        given = {field.name: (getattr(value, field.name), field) for field in fields(value)}
        return {name: _facts(found) for name, (found, field) in given.items() if found != _default(field)}
    if isinstance(value, Mapping):
        return {str(key): _facts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_facts(item) for item in value]
    return _code(value) if callable(value) else value


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _code(function: Callable[..., Any]) -> str:
    """Name a function, and what it does where that can be read: neither comments nor layout count."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return name
    try:
        text = ast.dump(ast.parse(text))
    except SyntaxError:  # a lambda, in the middle of something
        text = " ".join(text.split())
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a pipeline's parts, as its index names them, and what it says of itself."""
    index = folder / _TOP[0]
    parts: dict[str, Any] = read_record(index, dict[str, Any])
    for name in _TOP:
        if (folder / name).is_file():
            yield folder / name
    for name in sorted(parts):
        for file in sorted((folder / name).rglob("*")) if not name.startswith("_") else ():
            if file.is_file() and not file.name.startswith("."):
                yield file


def _known(notes: Path | None) -> dict[str, tuple[int, int, str]]:
    """Return what was hashed before; notes that are damaged are made again."""
    try:
        found: Notes | None = read_record(notes, Notes) if notes is not None else None
    except PpclError:
        return {}
    return found.files if found is not None and found.sha256 == digest_of(_plain(found.files)) else {}


def _plain(files: dict[str, tuple[int, int, str]]) -> dict[str, list[Any]]:
    return {name: [*entry] for name, entry in files.items()}
