"""What single values of a recipe may be, and the YAML that holds them: a slip is an error, and not another job."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
BLOCKS = 1000
"""More than any model has in a stack."""
_WHOLE = {"height": 2**16, "width": 2**16, "num_inference_steps": 10_000, "max_sequence_length": 2**16}
"""Arguments of a pipeline that are counts, and more than any model takes."""
_OURS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = re.compile(r"teacher|con|prn|aux|nul|(com|lpt)\d", re.IGNORECASE)
_CHARACTERS, _DEPTH, _NODES, _DIGITS = 1_000_000, 20, 20_000, 40
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_MERGE = "tag:yaml.org,2002:merge"


def check_name(name: str) -> str:
    """Return a variant's name; a `ValueError` for one that is no plain folder name, or stands for something else."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:100]!r}: a name has letters, digits, '.', '_' and '-', and begins with a letter or digit"
        )
    if _RESERVED.fullmatch(name.split(".")[0]) or name.endswith((".", ".partial")):
        raise ValueError(f"{name!r} is a name that stands for something else; choose another")
    return name


Name = Annotated[str, AfterValidator(check_name)]


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Return seeds of which each makes something else."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"one of these seeds stands there twice: {', '.join(map(str, seeds))}")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]


def read_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return a YAML document as nodes and as plain data.

    A `yaml.YAMLError` names the place of duplicate keys, of numbers that are not finite or longer than any value, of
    tags and dates, and of what is larger or deeper than any recipe, aliases counted as often as they stand.
    """
    if len(text) > _CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, a recipe at most {_CHARACTERS:,}")
    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > _DEPTH or nodes > _NODES:
            raise _at(event, "it is larger or deeper than any recipe")
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if tree is not None:
        _check(tree, (), {})
    return tree, yaml.load(text, Loader=yaml.SafeLoader)


def _check(node: yaml.Node, above: tuple[int, ...], known: dict[int, int]) -> int:
    """Return how many nodes there are from this one on, what aliases name counted wherever they stand."""
    if id(node) in above:
        raise _at(node, "an alias names what it is in")
    if node.tag not in _TAGS:
        kind = node.tag.rpartition(":")[2]
        raise _at(node, f"a {kind} is no value of a recipe; write it in quotes if it is a text")
    if id(node) not in known:
        known[id(node)] = 1 + sum(_check(child, (*above, id(node)), known) for child in _children(node))
    if known[id(node)] > _NODES:
        raise _at(node, "its aliases make it larger than any recipe")
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _at(key, "a key is a single word")
            if key.value in seen and key.tag != _MERGE:
                raise _at(key, f"{key.value[:80]!r} stands here twice")
            seen.add(key.value)
            yield from (key, value)
    elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
        _check_number(node)


def _check_number(node: yaml.ScalarNode) -> None:
    if len(node.value) > _DIGITS:
        raise _at(node, f"a number of {len(node.value):,} characters")
    if node.tag.endswith(":float") and not math.isfinite(yaml.SafeLoader("").construct_yaml_float(node)):
        raise _at(node, f"{node.value} is no number of a recipe")


def _at(where: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def shortened(value: Any) -> str:
    """Return a value as it is shown in a message."""
    return cut(repr(value))


def cut(text: str, most: int = 100) -> str:
    """Return a text of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_call(call: Mapping[str, Any]) -> None:
    """Raise a `ValueError` where arguments of a pipeline cannot be right, whatever pipeline it is."""
    if name := next((name for name in _OURS if name in call), None):
        raise ValueError(f"call.{name} is not for recipes and options to set: ppcl gives prompts, seeds and the rest")
    for name, most in _WHOLE.items():
        value = call.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"call.{name} is a whole number from 1 on, not {shortened(value)}")
        if value > most:
            raise ValueError(f"call.{name} is at most {most:,}, not {shortened(value)}")
    for name in ("guidance_scale", "true_cfg_scale"):
        value = call.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"call.{name} is a number from 0 on, not {shortened(value)}")
    if name := next((name for name, value in call.items() if not _is_finite(value)), None):
        raise ValueError(f"call.{name} holds what is no number: {shortened(call[name])}")


def _is_finite(value: Any) -> bool:
    """Whether all numbers of plain data are finite: JSON of the command line may hold others."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_is_finite, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, float) or math.isfinite(value)
