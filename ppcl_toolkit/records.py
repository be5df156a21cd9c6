"""Records on disk: JSON, read as strictly as recipes are. What is damaged or foreign is named, file and field."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.values import BLOCKS, shortened

FileName = Annotated[str, Field(pattern=r"^[^/\\*?\[\]]+$")]
"""A name in a record: of a file beside it, and of no other place."""
_MOST = 2**28
"""Bytes of any record: that of a million samples has half as many."""


def read_record(path: Path, kind: Any) -> Any:
    """Return the JSON of a file as a `kind`, a type or a pydantic model.

    Raises `PpclError` for a file that is missing, no JSON, or JSON of another shape.
    """
    try:
        if path.stat().st_size > _MOST:
            raise PpclError(f"{path} has {path.stat().st_size:,} bytes, and no record has more than {_MOST:,}")
        text = path.read_bytes()
    except OSError as error:
        raise PpclError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_record(text, kind, str(path))


def parse_record(text: str | bytes, kind: Any, where: str) -> Any:
    """Return JSON as a `kind`; `where` is what a `PpclError` says it is of."""
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise PpclError(f"{where} is damaged or of something else: {problems(error)}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a file of another shape leads to, where it is taken apart, into a `PpclError` that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PpclError(f"{path} is damaged or of something else: {type(error).__name__}: {error}") from error


def check_depths(config: Any, where: str) -> None:
    """Raise `PpclError` where a config, plain data, asks for more layers than any model has: making them would hang."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, int) and value > BLOCKS and ("layers" in key or "depth" in key):
            raise PpclError(f"{where}: {shortened(key)} is {shortened(value)}, and no model has more than {BLOCKS}")
        check_depths(value, where)


def check_configs(folder: Path) -> None:
    """Do so for all parts of a pipeline's folder."""
    for path in sorted(folder.glob("*/config.json")):
        check_depths(read_record(path, dict[str, Any]), str(path))


def problems(error: ValidationError) -> str:
    """Return in one line what is wrong with which fields."""
    found = error.errors(include_url=False)
    told = [_told(".".join(map(str, each["loc"])), each["msg"]) for each in found[:3]]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(told) + more


def _told(field: str, message: str) -> str:
    said = message.removeprefix("Value error, ")
    said = said if len(said) <= 300 else f"{said[:297]}..."
    return f"{shortened(field)[1:-1]}: {said}" if field else said


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
