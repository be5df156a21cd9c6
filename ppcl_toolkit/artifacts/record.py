"""The record of a stage, `made_from.json`: what it was made from, and what it made."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from ppcl_toolkit.artifacts.files import RECORD, Checked, Files
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.records import read_record

_SAID = ("variant.json", "warnings.json")
"""What was measured or said of a result: it may differ in the last bits where the result is the same."""


class Record(BaseModel):
    """What a stage was made from, and what it made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    after: str
    """Digest of what was asked of the stages before it."""
    before: dict[str, str] | None = None
    """Digests of what those had made, by their names; None in runs of earlier versions, as the files."""
    files: Files | None = None
    """Of a finished stage."""
    sha256: str | None = None
    """Of all the rest, where the stage is finished."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read the record of a stage; one that is missing, broken or has changed is a `PpclError`."""
        found: Self = read_record(folder / RECORD, cls)
        if found.sha256 is not None and found != found.sealed():
            raise PpclError(f"{folder / RECORD} has other content than when it was made")
        return found

    def sealed(self) -> Self:
        """Return this record with its own SHA-256."""
        return self.model_copy(update={"sha256": digest_of(self.model_dump(exclude={"sha256"}))})

    @property
    def digest(self) -> str | None:
        """Digest of what the stage made, by which later stages know it again."""
        if self.files is None:
            return None
        return digest_of({name: entry.sha256 for name, entry in self.files.items() if name not in _SAID})

    def changed(self, made: Mapping[str, str]) -> list[str]:
        """Return the stages that had made something else than `made` has by their names."""
        return [name for name, was in (self.before or {}).items() if made.get(name, was) != was]


def checked(folder: Path) -> Checked:
    """Return what checks the files of a stage when they are read; of one at work, or an early version's, nothing is."""
    return Checked(Record.of(folder).files if (folder / RECORD).exists() else None)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(found: Any, wanted: Any, path: str) -> Iterator[str]:
    """Say where plain data differs; `path` is the name of all of it."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differences(found.get(key), wanted.get(key), f"{path}.{key}")
    elif found != wanted:
        yield f"{path} was {json.dumps(found)}, is {json.dumps(wanted)}"
