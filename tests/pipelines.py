"""Work that one process does, or several share out."""

import os
import signal
import time
from functools import partial
from unittest import mock

import tiny
from crowd import Crowd
from runs import DUAL, FLUX, SINGLE, batches, desk, plan_of, runner

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts import passes
from ppcl_toolkit.artifacts.storage import Bank, save_tree
from ppcl_toolkit.plan import FfnSwap, Interval, TextRun
from ppcl_toolkit.recipe import Depth, Probe, Recipe, Width
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.running.passage import Place
from ppcl_toolkit.running.pipelined import UNDER_WAY
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.probe import probe
from ppcl_toolkit.stages.select import select
from ppcl_toolkit.stages.width import distill_width

QWEN, SD3 = load_adapter("qwen_image"), load_adapter("sd3")
TEACHERS = {
    "flux": (tiny.flux_transformer, FLUX, [tiny.flux_inputs(seed=seed, text_tokens=5 + seed % 2) for seed in range(5)]),
    "sd3": (tiny.sd3_transformer, SD3, [tiny.sd3_inputs()] * 2),
    "qwen_image": (tiny.qwen_image_transformer, QWEN, [tiny.qwen_image_inputs()] * 2),
}
PLACES = {
    "flux": [
        Place(DUAL.path, 0, 0),
        Place(DUAL.path, 0, 2),
        Place(DUAL.path, 1, 2),
        Place(DUAL.path, 3, 3, (0, 1)),
        Place(SINGLE.path, 0, 1),
        Place(SINGLE.path, 2, 2),
    ],
    "sd3": [Place(SD3.stacks[0].path, 0, 1), Place(SD3.stacks[0].path, 2, 3), Place(SD3.stacks[0].path, 3, 3, (0, 1))],
    "qwen_image": [Place(QWEN.stacks[0].path, block, block, (0, 0) if block == 3 else None) for block in range(4)],
}
PATH = [Place(DUAL.path, 0, 1), Place(DUAL.path, 2, 3), Place(SINGLE.path, 1, 2)]
"""Readers of which each follows the one before."""
INTERVALS = (
    Interval(stack=DUAL.path, first=0, last=1),
    Interval(stack=DUAL.path, first=2, last=3),
    Interval(stack=SINGLE.path, first=0, last=2),
)
NARROW = (
    Interval(stack=DUAL.path, first=1, last=2),
    TextRun(stack=DUAL.path, reference=1, last=5),
    FfnSwap(stack=DUAL.path, block=0, streams=("image", "text")),
    FfnSwap(stack=DUAL.path, block=4, streams=("image",)),
)
DEPTHS = {
    "teacher": {},
    "student": {"inputs": "student"},
    "mixed": {"inputs": "mixed", "init": "best"},
    "streamed": {"inputs": "mixed"},
}
BATCHES = 8
STREAMED = Placement(streamed=True, chunk=2)


class Recorder:
    """Keeps what it reads; as a follower it answers with its target plus one."""

    def __init__(self, adapter, place):
        self.stack = adapter.stack(place.stack)
        _, self.first, self.last, self.reference = place
        self.seen = []

    def read(self, reading):
        self.seen.append(reading)

    def place(self, device):
        pass

    def respond(self, reading):
        return Streams(reading.target.image + 1, reading.target.text)


def readings(name, places, out, placement=None, *, follow=False):
    """Write what readers at `places` of a teacher read, a file for each."""
    make, adapter, inputs = TEACHERS[name]
    recorders = [Recorder(adapter, place) for place in places]
    run = Runner(make().requires_grad_(False), adapter, placement or Placement()).pipelined(recorders, inputs[0])
    counts = list(run.feed(inputs, recorders, follow=follow))
    assert counts in ([], [*range(run.placement.chunk, len(inputs), run.placement.chunk), len(inputs)])
    out.mkdir(parents=True, exist_ok=True)
    for place, recorder in zip(places, recorders, strict=True):
        assert bool(recorder.seen) == run.has(recorder)
        if recorder.seen:
            seen = [{"in": [*r.inputs], "out": [*r.target], "packed": r.packed_text} for r in recorder.seen]
            save_tree(out / f"{'-'.join(map(str, place))}.safetensors", seen)


def deep(folder, how, wrap=lambda noised: noised):
    """Distil intervals by the stage itself."""
    run = runner(placement=STREAMED if how == "streamed" else Placement())
    section = Depth(**{"steps": 6, "learning_rate": 1e-3, "checkpoint_every": 2, "split": "segments", **DEPTHS[how]})
    distill_depth(run, [plan_of(run, *INTERVALS)], wrap(batches()), section, desk(folder))


def wide(folder):
    """Distil an interval, and the narrow forms that are trained from it, by the stages themselves."""
    run = runner(6, 2)
    plans = [plan_of(run, *NARROW)]
    depth = Depth(steps=1, learning_rate=1e-3, split="segments")
    distill_depth(run, plans, batches(), depth, desk(folder / "depth"))
    processes.wait()
    section = Width(steps=3, learning_rate=1e-3, batches=4, checkpoint_every=2, split="segments")
    distill_width(run, plans, Bank(folder / "depth"), batches(), section, desk(folder / "width"))


def probed(name, out, wrap=lambda noised: noised):
    """Fit the probes of a teacher, and train them on, by the stage itself; states are written after every batch."""
    make, adapter, inputs = TEACHERS[name]
    noised = wrap([inputs[number % len(inputs)] for number in range(BATCHES)])
    section = Probe(batches=5, ridge=1e-3, steps=BATCHES - 5, learning_rate=1e-3)
    run = Runner(make().requires_grad_(False), adapter)
    with mock.patch.object(passes, "SECONDS", 0.0):
        probe(run, lambda start, stop: (noised[number] for number in range(start, stop)), section, desk(out))


def chosen(folder):
    """Choose by an integer program: processes share the candidates, and the first one measures what goes together."""
    run = runner()
    given = {
        "teacher": {"path": "x"},
        "targets": [{"name": "large", "params": "80%", "width": False}, {"name": "small", "params": "60%"}],
        "select": {"order": "program", "batches": 1},
        "width": {"ffn_blocks": 3},
    }
    select(run, plan_of(run), (INTERVALS, ()), batches(), Recipe.model_validate(given), desk(folder))
    processes.wait()


def fed(run, inputs, readers):
    """Feed readers to the end."""
    for _ in run.feed(inputs, readers):
        pass


class Patient(Recorder):
    """Ends a batch only when the first process has begun later ones: it must not wait for this one."""

    def __init__(self, adapter, place, begun):
        super().__init__(adapter, place)
        self._begun = begun

    def read(self, reading):
        super().read(reading)
        awaited = self._begun.with_name(f"begun-{len(self.seen) - 1 + UNDER_WAY}")
        for _ in range(6000):
            if awaited.exists() or len(self.seen) + UNDER_WAY > BATCHES:
                return
            time.sleep(0.01)
        raise TimeoutError(f"{awaited} is not there")


def overlapping(out):
    """Run batches of which the last reader ends none before others are on their way."""
    make, adapter, inputs = TEACHERS["flux"]
    out.mkdir(parents=True, exist_ok=True)
    last = Patient(adapter, PATH[-1], out / "begun")
    run = Runner(make().requires_grad_(False), adapter).pipelined([last], inputs[0])

    def noted():
        for number in range(BATCHES):
            if processes.world()[0] == 0:
                (out / f"begun-{number}").touch()
            yield inputs[number % len(inputs)]

    fed(run, noted(), [last])


def everything(out):
    """All of it, in one folder."""
    for name, places in PLACES.items():
        readings(name, places, out / "readings" / name)
        probed(name, out / "probes" / name)
    readings("flux", PLACES["flux"], out / "readings" / "streamed", STREAMED)
    readings("flux", PATH, out / "readings" / "follow", follow=True)
    for how in DEPTHS:
        deep(out / "depth" / how, how)
    wide(out / "wide")
    chosen(out / "select")


class Deadly:
    """Batches of which one kills the process that looks at it, when others have states of three parts on the disk."""

    def __init__(self, noised, at, folder):
        self._noised, self._at, self._folder = noised, at, folder

    def __call__(self, start, stop):
        return self._noised(start, stop)

    def __getitem__(self, number):
        if number == self._at:
            # Processes further on may be some batches behind.
            until = time.monotonic() + 60
            while len(parts_of(self._folder)) < 3 and time.monotonic() < until:
                time.sleep(0.01)
            self._folder.with_name(f"{self._folder.name}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._noised[number]


def doomed(out, rank, at, how):
    """Distil, or fit probes, until one of the processes is killed at a batch, and a file beside `out` says so."""
    work = partial(probed, "flux", out) if how == "probes" else partial(deep, out, how)
    if processes.world()[0] != int(rank):
        return work()
    return work(wrap=lambda noised: Deadly(noised, int(at), out))


def parts_of(folder):
    """Names of all that has a state on the disk."""
    return {path.name.split(".safetensors")[0].rpartition("-")[0] for path in folder.glob("state-*.tmp")}


WORK = {
    "everything": everything,
    "overlapping": overlapping,
    "deep": deep,
    "probes": lambda out: probed("flux", out),
    "doomed": doomed,
}


def launched(count, work, out, *arguments):
    """Start `work` in `count` processes."""
    return Crowd(count, lambda: WORK[work](out, *arguments))
