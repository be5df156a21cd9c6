"""Recipes as files: found by name, read strictly, and what is wrong in one told by its line."""

import difflib
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.values import cut, read_yaml, shortened

COMPARISON = "compare_"
"""How the names of shipped comparisons begin: they are recipes of another kind."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What a recipe that names one has beneath its own keys."""

    @field_validator("*", mode="after")
    @classmethod
    def _is_one_line(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{value[:80]!r} has a character that no name has")
        return value

    def dump(self) -> str:
        """Return this as YAML, every key resolved."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


Kind = TypeVar("Kind", bound=Section)
_COMMANDS = {"teacher": "compress", "job": "compare"}
"""Keys that recipes of one command alone have, and have to have."""


def read_recipe(model: type[Kind], source: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """Read a YAML file or a shipped recipe by name into a typed model; `overrides` are `section.key=value`.

    Raises `PpclError` that names the line and the nearest known key.
    """
    path = find_recipe(source)
    try:
        tree, data = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PpclError(f"{path} is not YAML for a recipe: {_of_yaml(error)}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise PpclError(f"{path} holds no mapping of recipe keys")
    for key, command in _COMMANDS.items():
        if key in data and key not in model.model_fields:
            raise PpclError(f"{path.name} is a recipe of `ppcl {command}`: it has a key {key!r}")
    for override in overrides:
        _override(data, override)
    merged = _merge(model.presets.get(str(data.get("preset")), {}), data)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        given = {tuple(override.partition("=")[0].split(".")) for override in overrides}
        raise PpclError(_explain(error, path, tree, (model, given))) from error


def shipped_recipes() -> list[str]:
    """List the names of the recipes in the package."""
    return [name for name in _shipped() if not name.startswith(COMPARISON)]


def shipped_comparisons() -> list[str]:
    """List the names of the comparisons in the package."""
    return [name for name in _shipped() if name.startswith(COMPARISON)]


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped one."""
    if Path(source).is_file():
        return Path(source)
    name = Path(source).name.removesuffix(".yaml")
    if name in _shipped() and str(source) in (name, f"{name}.yaml"):
        return Path(str(importlib.resources.files("ppcl_toolkit.recipes") / f"{name}.yaml"))
    raise PpclError(f"no recipe {str(source)!r}: give a YAML file or one of {', '.join(_shipped())}")


def shipped_text(name: str) -> str:
    """Return a recipe as it is written, or `slurm`: a job for several machines of a cluster."""
    if name == "slurm":
        return (importlib.resources.files("ppcl_toolkit.recipes") / "slurm.sh").read_text()
    return find_recipe(name).read_text()


def _shipped() -> list[str]:
    folder = importlib.resources.files("ppcl_toolkit.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _override(data: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise PpclError(f"--set {override!r}: expected section.key=value")
    *parents, key = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise PpclError(f"--set {override!r}: {parent!r} has no keys of its own")
    try:
        data[key] = read_yaml(value)[1]
    except yaml.YAMLError as error:
        raise PpclError(
            f"--set {shortened(override)}: the value is not YAML for a recipe: {_of_yaml(error)}"
        ) from error


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError, path: Path, tree: yaml.Node | None, asked: tuple[type[BaseModel], Any]) -> str:
    model, given = asked
    messages = []
    for problem in error.errors():
        location = cut(".".join(str(part) for part in problem["loc"]))
        message = cut(problem["msg"].removeprefix("Value error, "), 300)
        if problem["type"] == "extra_forbidden":
            known = _keys_at(model, problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            message = "unknown key" + (f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}")
        elif problem["type"] != "missing" and problem["loc"]:
            message += f", not {shortened(problem['input'])}"
        line = _line(tree, problem["loc"])
        place = f"{path.name}{f' line {line}' if line else ''}"
        if any(problem["loc"][: len(keys)] == keys for keys in given):
            place = "--set"
        messages.append(": ".join(filter(None, (place, location, message))))
    more = [f"and {len(messages) - _MOST} more"] if len(messages) > _MOST else []
    return "\n".join(messages[:_MOST] + more)


def _of_yaml(error: Exception) -> str:
    """Return in one line what is wrong, and where."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return " ".join(f"{f'line {mark.line + 1}: ' if mark else ''}{problem}".split())


_MOST = 10
"""Mistakes that are told at once."""
_NO_KIND = FieldInfo()


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    models = [root]
    for part in location:
        fields = models[0].model_fields if models else {}
        if part in fields:
            models = list(_models(fields[part].annotation))
        else:
            # Of several kinds, the location has the one that was meant.
            models = [m for m in models if m.model_fields.get("kind", _NO_KIND).default == part] or models
    return list(models[0].model_fields) if models else []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int | None:
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
