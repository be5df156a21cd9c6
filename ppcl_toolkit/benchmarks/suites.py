"""The benchmarks of the paper as data: how each reads its prompts, where its scorer looks for images, what it writes.

| suite | prompt file, as its repository has it | images of a prompt, below `<out>/<suite>/` |
|---|---|---|
| geneval | `evaluation_metadata.jsonl`: a line a prompt, with `prompt` and `tag` | `<model>/00000/samples/0000.png` to `0003.png`, and `<model>/00000/metadata.jsonl` with the line |
| dpg | the folder `prompts`, a `<id>.txt` a prompt, or `dpg_bench.csv` with `item_id` and `text` | `<model>/<id>.png`: four images, 2x2 |
| longtext | `text_prompts.jsonl` or `text_prompts_zh.jsonl`: lines with `prompt_id` and `prompt` | `en/<model>/0000_1.png` to `0000_4.png`; `zh/...` for Chinese prompts |
| oneig | `OneIG-Bench.csv` or `OneIG-Bench-ZH.csv`: `category`, `id`, and `prompt_en` or `prompt_cn` | `en/<category>/<model>/000.webp`: four images, 2x2; `zh/...` |
| t2i-compbench | `<category>_val.txt`: a prompt a line, up to a tab | `<category>/<model>/samples/<prompt>_000000.png`: ten images, numbered through |

Scorers are given `<out>/<suite>/<model>` and the like; their results come back by `ppcl eval --scores`.
"""  # noqa: E501 - a table

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppcl_toolkit.benchmarks import scores
from ppcl_toolkit.benchmarks.scores import Score
from ppcl_toolkit.errors import PpclError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a benchmark."""

    text: str
    name: str
    """What its images are named by: an id, or its position in the file."""
    group: str = ""
    """Folder of its category, where the benchmark has folders."""
    metadata: str = ""
    """What the scorer wants to find beside the images."""


Prompts = tuple[str, list[Prompt]]
"""What a prompt file holds: the part of the benchmark (a language, a category; or empty), and its prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One benchmark."""

    name: str
    images: int
    """For each prompt."""
    grid: bool = False
    """Whether they are one file, row by row in a square."""
    read: Callable[[Path], Prompts]
    """Reads a prompt file."""
    place: Callable[[Prompt, int, str], str]
    """Path of an image, by its prompt, its number from 0 and the name of the model."""
    metadata: Callable[[Prompt, str], str] | None = None
    """Path of a prompt's metadata."""
    scores: Callable[[Path], list[Score] | None]
    """Reads what the scorer wrote; None for a file of another kind."""


def find_suite(name: str) -> Suite:
    """Return the suite of this name; an unknown one is a `PpclError` that lists them."""
    if name not in SUITES:
        raise PpclError(f"--suite {name!r}: there are {', '.join(SUITES)}")
    return SUITES[name]


def read_scores(arguments: Sequence[str]) -> list[Score]:
    """Read files that scorers wrote; `MODEL=FILE` names the model where the file or its place does not.

    Raises `PpclError` for a file that no scorer of these benchmarks writes.
    """
    found = []
    for argument in arguments:
        model, equals, file = argument.partition("=")
        if not equals or Path(argument).exists():
            model, file = "", argument
        if not Path(file).is_file():
            raise PpclError(f"{file} is no file; --scores takes what scorers wrote, as FILE or MODEL=FILE")
        found += _named(_read(Path(file)), model, file)
    return found


def read_geneval(path: Path) -> Prompts:
    """Read GenEval's prompts: JSON lines, which become the metadata of their images."""
    lines = _json_lines(path, "prompt", "tag")
    return "", [Prompt(line["prompt"], str(i), metadata=json.dumps(line)) for i, line in enumerate(lines)]


def read_dpg(path: Path) -> Prompts:
    """Read DPG-Bench's prompts: a folder of text files, or the table of its questions."""
    if path.is_dir():
        return "", [Prompt(_text(file).strip(), file.stem) for file in sorted(path.glob("*.txt"))]
    texts = {line["item_id"]: line["text"] for line in _csv_lines(path, "item_id", "text")}
    return "", [Prompt(text.strip(), name) for name, text in texts.items()]


def read_longtext(path: Path) -> Prompts:
    """Read LongText-Bench's prompts, of one language: JSON lines."""
    prompts = [Prompt(line["prompt"], str(line["prompt_id"])) for line in _json_lines(path, "prompt", "prompt_id")]
    if strange := [prompt.name for prompt in prompts if not prompt.name.isdigit()]:
        raise PpclError(f"{path}: prompt_id {strange[0]!r} is no number")
    return "zh" if scores.is_chinese(prompt.text for prompt in prompts) else "en", prompts


def read_oneig(path: Path) -> Prompts:
    """Read OneIG-Bench's prompts, of one language: a table."""
    folders = {
        "Anime_Stylization": "anime",
        "Portrait": "human",
        "General_Object": "object",
        "Text_Rendering": "text",
        "Knowledge_Reasoning": "reasoning",
        "Multilingualism": "multilingualism",
    }
    lines = _csv_lines(path, "category", "id")
    chinese = bool(lines) and "prompt_cn" in lines[0]
    prompts = []
    for line in lines:
        text = line.get("prompt_cn" if chinese else "prompt_en")
        if line["category"] not in folders or not text:
            what = "prompt_en or prompt_cn is missing" if not text else f"the categories are {', '.join(folders)}"
            raise PpclError(f"{path}: {line['category']} {line['id']}: {what}")
        prompts.append(Prompt(text, line["id"], group=folders[line["category"]]))
    return "zh" if chinese else "en", prompts


def read_compbench(path: Path) -> Prompts:
    """Read T2I-CompBench's prompts of one category; its images are named by them."""
    texts = [line.split("\t")[0].strip() for line in _text(path).split("\n") if line.strip()]
    for text in texts:
        if "/" in text or "_" in text or len(text.encode()) > 240:
            raise PpclError(f"{path}: {text!r} cannot name a file: it is too long, or has a / or _")
    return path.stem.removesuffix("_val"), [Prompt(text, str(i)) for i, text in enumerate(texts)]


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="geneval",
            images=4,
            read=read_geneval,
            place=lambda prompt, number, model: f"{model}/{int(prompt.name):05}/samples/{number:04}.png",
            metadata=lambda prompt, model: f"{model}/{int(prompt.name):05}/metadata.jsonl",
            scores=scores.read_geneval,
        ),
        Suite(
            name="dpg",
            images=4,
            grid=True,
            read=read_dpg,
            place=lambda prompt, _, model: f"{model}/{prompt.name}.png",
            scores=scores.read_dpg,
        ),
        Suite(
            name="longtext",
            images=4,
            read=read_longtext,
            place=lambda prompt, number, model: f"{model}/{int(prompt.name):04}_{number + 1}.png",
            scores=scores.read_longtext,
        ),
        Suite(
            name="oneig",
            images=4,
            grid=True,
            read=read_oneig,
            place=lambda prompt, _, model: f"{prompt.group}/{model}/{prompt.name}.webp",
            scores=scores.read_oneig,
        ),
        Suite(
            name="t2i-compbench",
            images=10,
            read=read_compbench,
            place=lambda prompt, n, model: f"{model}/samples/{prompt.text}_{10 * int(prompt.name) + n:06}.png",
            scores=scores.read_compbench,
        ),
    )
}


def _read(path: Path) -> list[Score]:
    for suite in SUITES.values():
        if found := suite.scores(path):
            return found
    raise PpclError(
        f"{path} is not what a scorer of {', '.join(SUITES)} writes: results.jsonl of GenEval or LongText-Bench, "
        "the results .txt of DPG-Bench, <dimension>_score_<EN|ZH>_<time>.csv of OneIG, vqa_result.json of T2I-CompBench"
    )


def _named(found: list[Score], model: str, file: str) -> list[Score]:
    if model and len(found) > 1:
        raise PpclError(f"{model}={file}: the file scores {len(found)} models and names them itself")
    if not model and not all(score.model for score in found):
        raise PpclError(f"{file} does not say of which model it is: give MODEL={file}")
    return [replace(score, model=model or score.model) for score in found]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PpclError(f"--prompts {path} cannot be read: {error}") from error


def _json_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(_text(path).split("\n"), 1):
        if text.strip():
            try:
                line = json.loads(text)
            except ValueError as error:
                raise PpclError(f"--prompts {path} line {number} is not JSON: {error}") from error
            if not isinstance(line, dict) or not all(key in line for key in keys):
                raise PpclError(f"--prompts {path} line {number}: expected an object with {', '.join(keys)}")
            lines.append(line)
    return lines


def _csv_lines(path: Path, *keys: str) -> list[dict[str, str]]:
    lines = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    if lines and (missing := [key for key in keys if key not in lines[0]]):
        raise PpclError(f"--prompts {path} has no column {', '.join(missing)}")
    return lines
