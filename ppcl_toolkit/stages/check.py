"""Stage `check`: the adapter against the teacher's own pipeline, before anything is recorded.

A few steps of a real run show how latents are noised and how the transformer is told; one of its calls shows whether
blocks may be run one by one, and whether a transformer without some of them is the same around those that are left.
What would end in a wrong model without a word ends here, in seconds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.checking.blame import fitting
from ppcl_toolkit.checking.dead import check_dead
from ppcl_toolkit.checking.dropped import check_dropped
from ppcl_toolkit.checking.forward import check_forward
from ppcl_toolkit.checking.steps import check_run
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.noising import Noising
from ppcl_toolkit.running.schedule import Batch, Runner

_FILE = "noising.json"
_PARTS = 4


def check(runner: Runner, pipeline: Any, run: Callable[..., None], desk: Desk) -> None:
    """Check the runner's adapter on the first steps of `run()`, as `check_run` does; write how `pipeline` noises.

    Raises `PpclError` with what would go wrong.
    """
    with runner.calling(pipeline), fitting(runner.adapter):
        noising, call = check_run(pipeline, runner.adapter, run)
    desk.progress(1, _PARTS, "noise")
    check_call(runner, call, desk)
    write_json(desk.folder / _FILE, noising.model_dump())


@torch.no_grad()
def check_call(runner: Runner, call: Batch, desk: Desk) -> None:
    """Check the runner's adapter on one call of its transformer; raises `PpclError` with what would go wrong."""
    with fitting(runner.adapter):
        witness = check_forward(runner, call)
        desk.progress(2, _PARTS, "block by block")
        check_dead(runner, witness)
        desk.progress(3, _PARTS, "text")
        check_dropped(runner, witness)
        desk.progress(4, _PARTS, "depth")


def load_noising(folder: Path) -> Noising:
    """Read how the pipeline of a run noises."""
    found: Noising = read_record(folder / _FILE, Noising)
    return found
