"""Speed of the hot paths, as ratios of medians within one run: `make bench`. Machines differ, ratios hardly do."""

import copy

import tiny
import torch
from torch.utils.benchmark import Timer

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.statistics.chains import ChainedCka, Heatmap
from ppcl_toolkit.statistics.cka import cka
from ppcl_toolkit.statistics.moments import Moments
from ppcl_toolkit.surgery.assemble import example_calls, reshape

FLUX = load_adapter("flux")


def median(function) -> float:
    """Seconds of one call."""
    with torch.no_grad():
        return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=1).median


def report(name: str, ratio: float) -> None:
    """One line of the table."""
    print(f"{name:64} {ratio:6.2f}")  # noqa: T201


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


if __name__ == "__main__":
    students()
    schedules()
    statistics()
    detection()
