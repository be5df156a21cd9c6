"""Speed of the hot paths, as ratios of medians within one run: `make bench`. Machines differ, ratios hardly do."""

import argparse
import copy
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median as middle

import bench_depth
import tiny
import torch
from torch.utils.benchmark import Timer

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.pipelined import UNDER_WAY
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.running.slices import slices
from ppcl_toolkit.statistics.chains import ChainedCka, Heatmap
from ppcl_toolkit.statistics.cka import cka
from ppcl_toolkit.statistics.moments import Moments
from ppcl_toolkit.surgery.assemble import example_calls, reshape

FLUX = load_adapter("flux")


def median(function) -> float:
    """Seconds of one call."""
    with torch.no_grad():
        return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=1).median


def report(name: str, ratio: float, goal: str = "") -> None:
    """One line of the table, and what it shall be."""
    print(f"{name:64} {ratio:6.2f}  {goal}".rstrip(), flush=True)  # noqa: T201


def students() -> None:
    """A student's forward beside its teacher's."""
    transformer, batch = tiny.flux_transformer(8, 8), tiny.flux_inputs(batch=8, image_tokens=256, text_tokens=64)
    empty = Plan(family="flux", depths=FLUX.depths(transformer))
    stack = FLUX.stacks[0].path
    plans = {
        "4 of 16 blocks removed": [Interval(stack=stack, first=0, last=4)],
        "FFNs of 4 blocks linear": [FfnSwap(stack=stack, block=b, streams=("image", "text")) for b in range(4)],
        "text of 4 blocks linear": [TextRun(stack=stack, reference=3, last=7)],
    }
    whole = median(lambda: transformer(**batch))
    for name, operations in plans.items():
        student = copy.deepcopy(transformer)
        reshape(student, FLUX, empty.with_operations(operations), batch)
        report(f"forward, {name} / teacher", median(lambda student=student: student(**batch)) / whole)


def schedules() -> None:
    """What recording and chunks cost beside a plain forward."""
    transformer, batch = tiny.flux_transformer(8, 8), tiny.flux_inputs(batch=8, image_tokens=256, text_tokens=64)
    whole = median(lambda: transformer(**batch))
    report(
        "recording the calls of all blocks / forward", median(lambda: example_calls(transformer, FLUX, batch)) / whole
    )

    class Nothing:
        stack, first, last, reference = FLUX.stacks[1], 0, 7, None

        def read(self, reading):
            pass

        def place(self, device):
            pass

    for name, placement in {"resident": Placement(), "streamed by 4": Placement(streamed=True, chunk=4)}.items():
        runner = Runner(transformer, FLUX, placement)
        seconds = median(lambda runner=runner: list(runner.feed([batch] * 4, [Nothing()])))
        report(f"{name}, 4 batches / 4 forwards", seconds / (4 * whole))


def statistics() -> None:
    """One batch's share of probes and CKA beside one matrix product of its size."""
    x, y = torch.randn(8, 1024, 256), torch.randn(8, 1024, 256)
    moments = Moments.zeros(256)
    product = median(lambda: x.flatten(0, 1).T @ x.flatten(0, 1))
    report("normal equations of one batch / X^T X in fp32", median(lambda: moments.add(x, y)) / product)
    report("CKA of one batch / X^T X in fp32", median(lambda: cka(x, y)) / product)


def detection() -> None:
    """Eq. 3 and Fig. 5 of one sample and 60 blocks, beside Appendix 6 written out for every pair in fp64."""
    depth, tokens, width = 60, 256, 64
    outputs = [torch.randn(1, tokens, width) for _ in range(depth)]
    weights = [None, *(0.01 * torch.randn(width, width) for _ in range(depth - 1))]
    center = torch.eye(tokens, dtype=torch.float64) - 1 / tokens

    def gram(x):
        return center @ (x @ x.T) @ center

    def similarity(k, m):
        return (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()

    def naive():
        for u, output in enumerate(outputs):
            x = output[0].double()
            for k in range(u + 1, depth):
                x = x + x @ weights[k].double().T
                similarity(gram(output[0].double()), gram(x))
                similarity(gram(output[0].double()), gram(outputs[k][0].double()))

    def ours():
        chained, plain = ChainedCka(weights), Heatmap(depth)
        for block, output in enumerate(outputs):
            chained.observe(block, output)
            chained.follow(block)
            plain.observe(0, block, output)
        plain.close(0, output.device)

    report("detection of 60 blocks, naive / ours", median(naive) / median(ours))


BATCHES = 300
"""Of the schedules that are counted, in which every block takes one unit of time, and training a student three."""


def alone(spans) -> float:
    """Batches per unit of time that one process trains on."""
    return 1 / (1 + max(last for _, last in spans) + 3 * len(spans))


def by_segments(spans, count: int) -> float:
    """The same where each process runs all of the teacher for its share of the segments."""
    shares = (spans[rank::count] for rank in range(count))
    return 1 / max(1 + own[-1][1] + 3 * len(own) for own in shares if own)


def sliced(spans, count: int) -> float:
    """The same in a pipeline of slices, from the first batch to the last, with as many under way as there may be."""
    parts = slices([1] * (1 + max(last for _, last in spans)), spans, count)
    times = [len(part.blocks) + 3 * len(part.spans) for part in parts]
    begun, ended = ([[0.0] * BATCHES for _ in times] for _ in range(2))
    for batch, rank in itertools.product(range(BATCHES), range(len(times))):
        arrived = ended[rank - 1][batch] if rank else 0.0
        free = ended[rank][batch - 1] if batch else 0.0
        begun[rank][batch] = max(arrived, free)
        ended[rank][batch] = begun[rank][batch] + times[rank]
        # Handing a batch on waits until the next process has taken one of the batches before.
        if rank + 1 < len(times) and batch >= UNDER_WAY:
            ended[rank][batch] = max(ended[rank][batch], begun[rank + 1][batch - UNDER_WAY])
    return BATCHES / ended[-1][-1]


def pipelines() -> None:
    """Counted: how many times one device several are, for Qwen-Image's 60 equal blocks with the paper's intervals."""
    spans = [(interval.first, interval.last) for interval in Recipe.load("paper_qwen_image").intervals.given]
    for count in (2, 4, 8):
        report(f"{count} slices of a teacher / one device, counted", sliced(spans, count) / alone(spans))
        report(f"{count} whole teachers, segments shared out / one, counted", by_segments(spans, count) / alone(spans))


def depth() -> None:
    """A step of depth distillation beside what it must take; streamed beside resident; two processes beside one.

    On CPUs streaming copies nothing: what is seen is its bookkeeping. Medians of ratios, each of neighbours in time.
    """
    resident, streamed = bench_depth.teacher(), bench_depth.teacher(Placement(streamed=True, chunk=4))
    steps, over, slower = [], [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            step = bench_depth.seconds_of_a_step(resident, Path(one))
            steps.append(step)
            over.append(step / bench_depth.floor(resident))
            slower.append(bench_depth.seconds_of_a_step(streamed, Path(other)) / step)
    report("depth, a step / teacher's and 3 x students' forwards", middle(over), "goal: at most 1.10")
    report("depth, streamed by 4 / resident", middle(slower), "goal: at most 1.50")
    cores = len(os.sched_getaffinity(0))
    said = "goal: at least 1.80" if cores >= 2 else f"goal: at least 1.80 on 2 cores; here is {cores}"
    report("depth, steps a second of 2 processes / of 1 (gloo)", middle(steps) / of_two(), said)


def of_two() -> float:
    """Seconds of a depth step that two processes share, one core each: the median over both and three runs."""
    with tempfile.TemporaryDirectory() as folder:
        script = ["--nproc-per-node=2", "--standalone", str(Path(__file__).with_name("bench_depth.py")), folder]
        command = [sys.executable, "-m", "torch.distributed.run", *script]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    return middle(map(float, done.stdout.split()))


PARTS = {part.__name__: part for part in (depth, pipelines, students, schedules, statistics, detection)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}; else all")
    torch.set_num_threads(1)
    for name in parser.parse_args().parts:
        PARTS[name]()
