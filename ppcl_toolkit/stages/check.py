"""Stage `check`: the adapter against the teacher's own pipeline, before anything is recorded.

A few steps of a real run show how latents are noised and how the transformer is told; one of its calls shows whether
blocks may be run one by one, and whether a transformer without some of them is the same around those that are left.
What would end in a wrong model without a word ends here, in seconds.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.checking.dead import check_dead
from ppcl_toolkit.checking.dropped import check_dropped
from ppcl_toolkit.checking.forward import check_forward
from ppcl_toolkit.checking.steps import check_steps
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.noising import Noising, check_negatives, noising_of, observed
from ppcl_toolkit.running.schedule import Batch, Runner

_FILE = "noising.json"
_PARTS = 4
_OTHER = "nothing that anybody asked for"
"""A prompt."""


def check(runner: Runner, pipeline: Any, run: Callable[..., None], desk: Desk) -> None:
    """Check the runner's adapter on the first steps of `run()`, which calls `pipeline`; write how it noises.

    `run(prompt)` calls it with another prompt.

    Raises `PpclError` with what would go wrong.
    """
    with runner.calling(pipeline):
        steps = observed(pipeline, runner.adapter, run)
        (other,) = observed(pipeline, runner.adapter, partial(run, _OTHER), 1)
    check_negatives(steps[0], other, runner.adapter)
    noising = noising_of(pipeline.scheduler, runner.adapter, steps)
    check_steps(steps, other, runner.adapter)
    desk.progress(1, _PARTS, "noise")
    call = {**steps[-1].call, "return_dict": False}
    del steps, other
    check_call(runner, call, desk)
    write_json(desk.folder / _FILE, noising.model_dump())


@torch.no_grad()
def check_call(runner: Runner, call: Batch, desk: Desk) -> None:
    """Check the runner's adapter on one call of its transformer; raises `PpclError` with what would go wrong."""
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
