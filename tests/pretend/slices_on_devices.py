"""What each process with a pretended device does in a pipeline; `test_slices_on_devices.py` starts them."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from runs import DUAL, SINGLE, batches, desk, plan_of, runner

from ppcl_toolkit import processes
from ppcl_toolkit.plan import Interval
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.stages.depth import distill_depth

INTERVALS = [
    *(Interval(stack=DUAL.path, first=block, last=block + 1) for block in (0, 2)),
    *(Interval(stack=SINGLE.path, first=block, last=block + 2) for block in (0, 3, 6, 9)),
]


def distilled(folder: Path, placement: Placement) -> None:
    """Train a student of every interval, sequentially from the second half on."""
    run = runner(4, 12, placement)
    section = Depth(steps=4, learning_rate=1e-3, split="segments", inputs="mixed")
    distill_depth(run, [plan_of(run, *INTERVALS)], batches(), section, desk(folder))


def main(folder: Path, *, streamed: bool) -> None:
    """Distil on this process's device, and note the most that it held."""
    device = processes.pick_device("auto")
    rank, _ = processes.world()
    assert device == torch.device("cuda", rank)
    assert processes.messages_on(device).type == "cpu"  # gloo is all there is here
    distilled(folder / "bank", Placement(device=device, streamed=streamed, chunk=2))
    (folder / f"peak-{rank}.json").write_text(json.dumps(torch.cuda.max_memory_allocated()))
    processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), streamed=sys.argv[2] == "streamed")
