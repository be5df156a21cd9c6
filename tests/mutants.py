"""Recipes, plans, records and indexes of all shapes: a few hundred at a time, read in a process with limits."""

import json
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from test_damage import READERS, without_proof

from ppcl_toolkit import Recipe
from ppcl_toolkit.artifacts.variant import load_compressed
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan, trained_forms
from ppcl_toolkit.recipe_files import shipped_recipes, shipped_text

COUNT = 400
SECONDS, MEMORY = 5, 10**9
INDEX = "variants/small/transformer/diffusion_pytorch_model.safetensors.index.json"
NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**40, -(10**18), 1e308, 0.5, float("nan"), float("inf"), "", "x", "0",
    "-1", "../../etc/passwd", "/dev/zero", "\x00", "\ud800", "x" * 5000, "100%", "1e9", "module:NAME", "__proto__",
    [], {}, [[]], [{}], {"": None}, [None] * 300, {"a": {"a": {"a": {"a": 1}}}}, [0] * 5000, {"tensor": "0"},
)  # fmt: skip
SNIPPETS = (
    "&a [*a]",
    "!!python/object/apply:os.system [true]",
    "{a: &b [x, x], c: [*b, *b]}",
    "- ",
    "? ",
    "\t",
    "%",
    "'",
)
SNIPPETS += (
    "2020-01-01",
    "0x" + "f" * 60,
    "9" * 6000,
    "[" * 900,
    "{a: " * 300,
    ".nan",
    "<<: {a: 1}",
    "\ufeff",
    "|",
    "1:1",
)


class Hang(BaseException):
    """It takes too long."""


def batch(world: Path, seed: str, tell: Callable[..., None]) -> tuple[dict[str, int], list[str]]:
    """Read so many mutants; return figures, and what failed."""
    warnings.simplefilter("ignore")
    rng, figures, failures = random.Random(seed), Counter[str](), []
    with tempfile.TemporaryDirectory(dir=world) as place:
        run = Path(place, "run")
        shutil.copytree(world / "run", run)
        without_proof(run)
        readers = _readers(run, Path(place, "recipe.yaml"))
        names, weights = zip(*((name, weight) for name, (weight, _) in readers.items()), strict=True)
        for name in names:  # what is imported or read for the first time
            readers[name][1](run)
        used = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x).split()[1])
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + MEMORY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, _hang), signal.signal(signal.SIGALRM, _hang)
        for number in range(COUNT):
            name = rng.choices(names, weights)[0]
            path = Path(place, "recipe.yaml") if name.startswith("recipe") else run / name
            content = shipped_text(name.split()[1]).encode() if name.startswith("recipe ") else path.read_bytes()
            path.write_bytes(mutated(content, rng, path.suffix == ".yaml"))
            how = _read(lambda: readers[name][1](run))  # noqa: B023
            figures["mutants"] += 1
            figures[how.split(":")[0]] += 1
            if how not in ("read", "refused"):
                kept = Path(tempfile.gettempdir(), f"torture-{seed.replace('/', '-')}-{number}{path.suffix}")
                shutil.copy(path, kept)
                failures.append(f"{name}: {how} ({kept})")
            path.write_bytes(content)
            tell(number)
    return dict(figures), failures


def _readers(run: Path, recipe: Path) -> dict[str, tuple[float, Callable[[Path], Any]]]:
    """What is read, how often, and how."""
    index = run / INDEX
    weights = index.with_name("diffusion_pytorch_model.safetensors")
    with safe_open(weights, "pt") as file:
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(file.keys(), weights.name)}))
    recipe.write_text(shipped_text("tiny"))
    found = {f"recipe {name}": (2.0, lambda _: Recipe.load(recipe).dump()) for name in shipped_recipes()}
    plan = "variants/small/plan.json"
    found[plan] = (25.0, lambda run: trained_forms([Plan.load(run / plan)]))
    found[INDEX] = (1.0, lambda run: load_compressed(run / "variants" / "small"))
    # Some open a whole pipeline.
    slow = (
        "variants/",
        "evaluate/",
        "summary",
        "environment",
        "depth/losses",
        "finetune/small/losses",
        "select/measured",
    )
    return {name: (0.4 if name.startswith(slow) else 3.0, read) for name, read in READERS.items()} | found


def _read(work: Callable[[], Any]) -> str:
    started = time.monotonic()
    # Of this process alone: other work may slow it down. What waits for ever takes none.
    signal.setitimer(signal.ITIMER_PROF, SECONDS), signal.setitimer(signal.ITIMER_REAL, 30 * SECONDS)
    try:
        work()
        how = "read"
    except PpclError as error:
        how = "refused" if "out of memory" not in str(error) and len(str(error)) < 5000 else f"said: {str(error)[:200]}"
    except Hang:
        how = f"hung: {time.monotonic() - started:.0f} s"
    except BaseException as error:
        how = f"traceback: {type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0), signal.setitimer(signal.ITIMER_REAL, 0)
    return how


def _hang(*_: Any) -> None:
    raise Hang


def mutated(content: bytes, rng: random.Random, is_yaml: bool) -> bytes:
    """Change a file: a value or a key of its data, or bytes of its text."""
    if rng.random() < 0.6:
        tree = yaml.safe_load(content) if is_yaml else json.loads(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            tree = _grafted(tree, rng)
        return json.dumps(tree).encode(errors="replace")
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + int(rng.expovariate(0.1)))
        how = rng.randrange(5)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:end]
        elif how == 2:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        elif how == 3:
            data[at:at] = rng.choice(SNIPPETS).encode(errors="replace")
        else:
            data = data[:at]
    return bytes(data)


def _grafted(tree: Any, rng: random.Random) -> Any:
    """Put something else in a random place of plain data."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.05:
        return rng.choice(NASTY)
    key = rng.choice([*tree]) if isinstance(tree, dict) else rng.randrange(len(tree))
    tree = tree.copy()
    how = rng.random()
    if how < 0.1:
        del tree[key]
    elif how < 0.2 and isinstance(tree, dict):
        tree[str(rng.choice(NASTY))[:80]] = tree.pop(key)
    elif how < 0.4:
        tree[key] = rng.choice(NASTY)
    else:
        tree[key] = _grafted(tree[key], rng)
    return tree
