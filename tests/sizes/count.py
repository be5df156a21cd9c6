"""Count what a stage takes at full size: its real code, on tensors without data.

python tests/sizes/count.py --recipe flux_8b --stage depth [--streamed] [--devices 8] [--detail]
python tests/sizes/count.py --all                # a table in Markdown, a process a row
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

PLANS = {"flux_8b": ("paper_flux", 1), "qwen_image_10b": ("paper_qwen_image", 3)}
"""Recipes that search, the one that lists what the paper found for them, and how many of its targets are meant."""


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
    parser.add_argument("--detail", action="store_true", help="what is alive at the peak, by the line that made it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    return parser.parse_args(options)


def counted(asked: argparse.Namespace) -> dict:
    """Run one stage, and return what it took."""
    import fakes

    ledger = fakes.activate(detailed=asked.detail, card=int(asked.card * 1e9))
    import disk
    import stages
    from subjects import subject

    recipe, model, chosen = prepared(asked)
    disk.replace()
    fakes.join(asked.devices, asked.rank, int(asked.host * 1e9), ledger)
    if asked.devices > 1:
        fakes.hand_over(model.calls, getattr(recipe, asked.stage).batch)
    started = time.monotonic()
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
    return {
        "recipe": asked.recipe,
        "stage": asked.stage,
        "device": ledger.peak["cuda:0"],
        "host": ledger.peak["cpu"],
        "device_line": ledger.place.get("cuda:0", "at its start"),
        "host_line": ledger.place.get("cpu", "at its start"),
        "seconds": round(time.monotonic() - started, 1),
        "held": {name: dict(lines.most_common(16)) for name, lines in ledger.held.items() if name in ("cuda:0", "cpu")},
    }


def prepared(asked: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the recipe with few steps, its teacher without weights, and the plans that are meant."""
    from subjects import readable, shortened

    from ppcl_toolkit.budget.model import Model
    from ppcl_toolkit.budget.plans import plans
    from ppcl_toolkit.recipe import Recipe

    recipe = shortened(Recipe.load(asked.recipe, asked.set), asked.chunk)
    listed, targets = PLANS[asked.recipe] if asked.published else (asked.recipe, len(recipe.targets))
    model = readable(Model.of(recipe))
    return recipe, model, dict(list(plans(Recipe.load(listed), model).items())[:targets])


def planned(asked: argparse.Namespace) -> dict[str, int]:
    """Return what `ppcl plan` says of the same, without the text encoders that are not counted here."""
    from ppcl_toolkit.budget import Machine
    from ppcl_toolkit.budget.blocks import Blocks
    from ppcl_toolkit.budget.memory import Memory
    from ppcl_toolkit.budget.report import Budget
    from ppcl_toolkit.budget.whole import Whole

    recipe, model, chosen = prepared(asked)
    budget = Budget(recipe, chosen, Blocks(model))
    machine = Machine(card=int(asked.card * 1e9), host=int(asked.host * 1e9), devices=asked.devices)
    need = budget.need(asked.stage, streamed=asked.streamed, machine=machine)
    others = Whole(Memory(recipe, budget.blocks, chosen), 0, 0).others
    return {"device": need.device, "host": need.host - others.host}


def both(options: Sequence[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Count in a process of its own, and plan in this one; a count that stops is a `RuntimeError`."""
    command = [sys.executable, __file__, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1]), planned(arguments(options))


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
    ("sd35_large_5b", "depth"),
    ("sd35_large_5b", "depth", "--streamed"),
    ("flux_8b", "intervals"),
]


def table() -> None:
    """Print what is counted and planned of every case, a process each."""
    print("| recipe, stage | device GB | plan | host GB | plan | highest on the device | on the host |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    for recipe, stage, *options in ROWS:
        published = ["--published"] if recipe in PLANS else []
        told = " ".join([recipe, stage, *(option for option in options if option != "--set")])
        try:
            found, plan = both(["--recipe", recipe, "--stage", stage, *options, *published])
        except RuntimeError as error:
            print(f"| {told} | stops: {str(error).splitlines()[-1]} | | | | | |", flush=True)  # noqa: T201
            continue
        sizes = [size for place in ("device", "host") for size in (found[place], plan[place])]
        cells = [*(f"{size / 1e9:.1f}" for size in sizes), found["device_line"], found["host_line"]]
        print(f"| {told} | {' | '.join(cells)} |", flush=True)  # noqa: T201


def main() -> None:
    asked = arguments()
    if asked.all:
        table()
        return
    if asked.json:
        print(json.dumps(counted(asked)))  # noqa: T201 - a command
        return
    found, plan = both(sys.argv[1:])
    for place in ("device", "host"):
        told = f"{found[place] / 1e9:7.2f} GB, planned {plan[place] / 1e9:7.2f}"
        print(f"{place:6} {told}  {found[f'{place}_line']}")  # noqa: T201
    for place, lines in found["held"].items():
        for line, size in lines.items():
            print(f"   {place} {size / 1e9:7.2f}  {line}")  # noqa: T201
    print(f"{found['seconds']} s")  # noqa: T201


if __name__ == "__main__":
    main()
