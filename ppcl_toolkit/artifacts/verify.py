"""Whether what lies in a folder is what was made there: every file of a run or of a variant, hashed."""

from pathlib import Path
from typing import NamedTuple

from ppcl_toolkit.artifacts.files import MANIFEST, RECORD, Files, damage, read_manifest, told
from ppcl_toolkit.artifacts.record import Record
from ppcl_toolkit.errors import PpclError


class Finding(NamedTuple):
    """What is said of a stage or a variant."""

    name: str
    said: str
    whole: bool | None
    """None where there is nothing to compare with."""


def verify(folder: Path) -> list[Finding]:
    """Compare every file in a run, all its stages and variants, or in a variant with what was recorded of it.

    Raises `PpclError` for a folder that is neither.
    """
    if (folder / "plan.json").is_file() or (folder / MANIFEST).is_file():
        return [_variant(folder, folder.name)]
    if not (folder / "recipe.yaml").is_file():
        raise PpclError(f"{folder} is no run and no variant: it has neither a recipe.yaml nor a {MANIFEST}")
    records = [path for path in sorted(folder.rglob(RECORD)) if not _at_work(path.relative_to(folder))]
    stages = sorted({path.parent for path in records} | _without_record(folder))
    variants = sorted(path for path in folder.glob("variants/*") if path.is_dir() and not _at_work(path))
    found = [_stage(path, path.relative_to(folder).as_posix()) for path in stages]
    return found + [_exported(path, folder) for path in variants]


def _stage(folder: Path, name: str) -> Finding:
    try:
        files = Record.of(folder).files
    except PpclError as error:
        return Finding(name, str(error), False)
    return _compared(folder, name, files)


def _variant(folder: Path, name: str) -> Finding:
    try:
        files = read_manifest(folder)
    except PpclError as error:
        return Finding(name, str(error), False)
    return _compared(folder, name, files)


def _exported(folder: Path, run: Path) -> Finding:
    """Look at a variant in a run, whose export has a copy of its manifest."""
    name = folder.relative_to(run).as_posix()
    if not (folder / MANIFEST).exists() and (run / "export" / folder.name / MANIFEST).exists():
        return Finding(name, f"{MANIFEST} is missing", False)
    return _variant(folder, name)


def _compared(folder: Path, name: str, files: Files | None) -> Finding:
    if files is None:
        return Finding(name, "nothing to compare with: no checksums were recorded", None)
    if wrong := damage(folder, files):
        return Finding(name, told(wrong), False)
    return Finding(name, f"{len(files):,} files, {sum(entry.size for entry in files.values()):,} bytes, as made", True)


def _without_record(run: Path) -> set[Path]:
    """Return the folders of stages that have lost their record."""
    names = (
        "check",
        "samples",
        "modulation",
        "probe",
        "intervals",
        "select",
        "depth",
        "width",
        "low_rank",
        "velocities",
    )
    places = [*(run / name for name in (*names, "evaluate")), *run.glob("finetune/*"), *run.glob("export/*")]
    return {path for path in places if path.is_dir() and not _at_work(path) and not (path / RECORD).exists()}


def _at_work(path: Path) -> bool:
    return any(part.endswith(".partial") for part in path.parts)
