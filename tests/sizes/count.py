"""Count what a stage takes at full size: its real code, on tensors without data.

python tests/sizes/count.py --recipe flux_8b --stage depth [--streamed] [--devices 8] [--detail]
python tests/sizes/count.py --all                # a table; fails where a plan is more than a tenth off
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

PLANS = {"flux_8b": ("paper_flux", 1), "qwen_image_10b": ("paper_qwen_image", 3)}
"""Recipes that search, the one that lists what the paper found for them, and how many of its targets are meant."""
CALLED = ("check", "samples", "evaluate")
"""Stages that call a pipeline, text encoders and all."""


def arguments(options: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="flux_8b")
    parser.add_argument("--stage", default="depth")
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0, help="which of the devices")
    parser.add_argument("--chunk", type=int, default=2, help="batches that share a visit; 0 for the recipe's")
    parser.add_argument("--card", type=float, default=1000.0, help="GB of a device")
    parser.add_argument("--host", type=float, default=1000.0, help="GB of the host")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--published", action="store_true", help="the paper's plans in place of assumed ones")
    parser.add_argument("--blocks", type=int, default=0, help="most blocks of a stack, at full width; 0 for all")
    parser.add_argument("--detail", action="store_true", help="what is alive at the peak, by the line that made it")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--serve", action="store_true", help="count what comes in, a list of these options a line")
    return parser.parse_args(options)


class Counter:
    """A process that counts case after case, each in a copy of itself: what takes long to import is there once."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def __call__(self, options: Sequence[str]) -> dict[str, Any]:
        """Count one case, once; where its stage stops, a `RuntimeError` says why."""
        key = tuple(options)
        if key not in self._known:
            self._known[key] = self._counted(key)
        return self._known[key]

    def _counted(self, options: Sequence[str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([*options]) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Answer lists of options, a line each."""
    import fakes

    ledger = fakes.activate()
    import stages  # noqa: F401 - what every case needs

    for line in sys.stdin:
        asked = arguments(json.loads(line))
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                print(json.dumps({"error": "the count was killed"}), flush=True)  # noqa: T201
            continue
        try:
            found = counted(asked, ledger)
        except BaseException:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), flush=True)  # noqa: T201
        os._exit(0)


def counted(asked: argparse.Namespace, ledger: Any) -> dict[str, Any]:
    """Run one stage, and return what it took."""
    import disk
    import fakes
    import stages
    from subjects import subject

    ledger.detailed, ledger.card = asked.detail, int(asked.card * 1e9)
    recipe, model, chosen = prepared(asked)
    disk.replace()
    fakes.join(asked.devices, asked.rank, int(asked.host * 1e9), ledger)
    if asked.devices > 1 and asked.stage in ("probe", "depth", "width"):
        fakes.hand_over(model.calls, getattr(recipe, asked.stage).batch)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, ledger:
        made = subject(
            ledger,
            recipe,
            model,
            chosen,
            streamed=asked.streamed,
            away=asked.stage in stages.AWAY or asked.devices > 1,
            folder=Path(folder),
        )
        ledger.begin()
        stages.STAGES[asked.stage](made)
        written = disk.written(Path(folder))
    return {
        "recipe": asked.recipe,
        "stage": asked.stage,
        "device": ledger.peak["cuda:0"],
        "host": ledger.peak["cpu"],
        "disk": written,
        "states": disk.most(),
        "device_line": ledger.place.get("cuda:0", "at its start"),
        "host_line": ledger.place.get("cpu", "at its start"),
        "seconds": round(time.process_time() - started, 1),
        "held": {name: dict(lines.most_common(16)) for name, lines in ledger.held.items() if name in ("cuda:0", "cpu")},
    }


def prepared(asked: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the recipe with few steps, its teacher without weights, and the plans that are meant."""
    from subjects import shortened

    from ppcl_toolkit.recipe import Recipe

    model, chosen = _meant(asked.recipe, asked.published, asked.blocks)
    return shortened(Recipe.load(asked.recipe, asked.set), asked.chunk if asked.streamed else 1), model, chosen


@functools.cache
def _meant(name: str, published: bool, blocks: int) -> tuple[Any, Any]:
    from subjects import readable, shallow

    from ppcl_toolkit.budget.model import Model
    from ppcl_toolkit.budget.plans import plans
    from ppcl_toolkit.recipe import Recipe

    recipe = Recipe.load(name)
    listed, targets = PLANS[name] if published else (name, len(recipe.targets))
    with shallow(recipe, blocks) as smaller:
        model = readable(Model.of(recipe))
        return model, dict(list(plans(smaller(Recipe.load(listed)), model).items())[:targets])


@functools.cache
def _blocks(*meant: Any) -> Any:
    from ppcl_toolkit.budget.blocks import Blocks

    return Blocks(_meant(*meant)[0])


def planned(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what `ppcl plan` says of the same, without text encoders where they are not counted."""
    from ppcl_toolkit.budget import Machine
    from ppcl_toolkit.budget.disk import disk
    from ppcl_toolkit.budget.memory import Memory
    from ppcl_toolkit.budget.report import Budget
    from ppcl_toolkit.budget.whole import Whole

    recipe, _, chosen = prepared(asked)
    budget = Budget(recipe, chosen, _blocks(asked.recipe, asked.published, asked.blocks))
    machine = Machine(card=int(asked.card * 1e9), host=int(asked.host * 1e9), devices=asked.devices)
    need = budget.need(asked.stage, streamed=asked.streamed, machine=machine)
    memory = Memory(recipe, budget.blocks, chosen, devices=asked.devices)
    others = 0 if asked.stage in CALLED else Whole(memory, 0, 0).others.host
    if asked.stage == "finetune":  # of one student
        first = next(name for name in chosen if name in recipe.tuned)
        alone = recipe.model_copy(update={"targets": [t for t in recipe.targets if t.name == first]})
        memory = Memory(alone, budget.blocks, {first: chosen[first]}, devices=asked.devices)
    return {"device": need.device, "host": need.host - others, "disk": disk(memory)}


def both(counter: Counter, options: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Count in another process, and plan in this one."""
    return counter(options), planned(arguments(options))


WIDE = (
    "flux_8b",
    "qwen_image_10b",
    "qwen_image_edit_2509_13b",
    "flux_lite_12gb",
    "sd35_large_5b",
    "sd35_medium_twice_as_fast",
    "flux2_klein_3b",
    "z_image_4_6b",
    "qwen_image21_5b",
    "chroma_6_9b",
    "wan_1b",
)
"""Recipes of eleven teachers, counted at full width and few blocks."""
ROWS = [
    (recipe, stage, *options)
    for recipe in PLANS
    for stage in ("probe", "select", "depth", "width", "velocities")
    for options in ((), ("--streamed",))
] + [
    *(
        (recipe, "finetune", "--set", f"finetune.optimizer={optimizer}", "--set", f"finetune.offload={offload}")
        for recipe in PLANS
        for optimizer in ("adamw", "adamw8bit", "adafactor")
        for offload in ("none", "blocks")
    ),
    *((recipe, "export") for recipe in PLANS),
    *(("flux_8b", "depth", "--devices", "8", "--rank", str(rank)) for rank in (0, 4, 7)),
    ("flux_8b", "finetune", "--devices", "8"),
    *(
        (recipe, stage, *options, "--blocks", "8")
        for recipe in WIDE
        for stage in ("samples", "probe", "select", "depth", "width", "velocities", "finetune", "export", "evaluate")
        if recipe in PLANS or stage not in CALLED
        # Of so few blocks, text goes from the one alone, and intervals from the others.
        if stage != ("depth" if recipe == "qwen_image_10b" else "width")
        for options in ((), ("--streamed",))
        if not options or stage not in ("finetune", "export")
    ),
]


def table() -> int:
    """Print what is counted and planned of every case, a process each."""
    print("| recipe, stage | device GB | plan | host GB | plan | highest on the device | on the host |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    counter, off = Counter(), 0
    for recipe, stage, *options in ROWS:
        published = ["--published"] if recipe in PLANS and "--blocks" not in options else []
        told = " ".join([recipe, stage, *(option for option in options if option != "--set")])
        try:
            found, plan = both(counter, ["--recipe", recipe, "--stage", stage, *options, *published])
        except RuntimeError as error:
            print(f"| {told} | stops: {str(error).splitlines()[-1]} | | | | | |", flush=True)  # noqa: T201
            off += 1
            continue
        off += any(abs(plan[place] - found[place]) > 0.1 * found[place] for place in ("device", "host"))
        sizes = [size for place in ("device", "host") for size in (found[place], plan[place])]
        cells = [*(f"{size / 1e9:.1f}" for size in sizes), found["device_line"], found["host_line"]]
        print(f"| {told} | {' | '.join(cells)} |", flush=True)  # noqa: T201
    return off


def main() -> None:
    asked = arguments()
    if asked.all:
        sys.exit(f"{off} of {len(ROWS)} plans are off" if (off := table()) else None)
    if asked.serve:
        serve()
        return
    found, plan = both(Counter(), sys.argv[1:])
    for place in ("device", "host"):
        told = f"{found[place] / 1e9:7.2f} GB, planned {plan[place] / 1e9:7.2f}"
        print(f"{place:6} {told}  {found[f'{place}_line']}")  # noqa: T201
    for place, lines in found["held"].items():
        for line, size in lines.items():
            print(f"   {place} {size / 1e9:7.2f}  {line}")  # noqa: T201
    print(f"on disk {found['disk']}, planned {plan['disk']}")  # noqa: T201
    print(f"{found['seconds']} s")  # noqa: T201


if __name__ == "__main__":
    main()
