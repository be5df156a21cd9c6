"""Slices divide the work as evenly as it can be divided, and work is what a forward counts."""

import itertools
import random

import pipelines
import pytest
import torch
from bench import alone, by_segments, sliced
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.capture import run_block, stack_calls
from ppcl_toolkit.running.slices import block_costs, slices


def work(costs, part):
    return sum(costs[block] for block in part.blocks) + 3 * sum(costs[first] for first, _ in part.spans)


def least(costs, spans, count):
    """The smallest largest share, by trying every way to cut the blocks and readers where they stand in line."""
    line = []
    for block in range(1 + max(last for _, last in spans)):
        line += [costs[block], *(3 * costs[first] for first, last in spans if last == block)]
    ways = itertools.combinations(range(1, len(line)), min(count, len(line)) - 1)
    cuts = ([0, *way, len(line)] for way in ways)
    return min(max(sum(line[a:b]) for a, b in itertools.pairwise(way)) for way in cuts)


def cases():
    chance = random.Random(0)
    for _ in range(150):
        depth = chance.randint(1, 7)
        spans = {tuple(sorted((chance.randrange(depth), chance.randrange(depth)))) for _ in range(chance.randint(1, 4))}
        yield [chance.randint(1, 9) for _ in range(depth)], sorted(spans), chance.randint(1, 6)


def test_no_other_cut_is_more_even():
    for costs, spans, count in cases():
        found = slices(costs, spans, count)
        assert max(work(costs, part) for part in found) == least(costs, spans, count), (costs, spans, count)


def test_every_block_and_every_reader_is_in_one_slice_in_order():
    for costs, spans, count in cases():
        found = slices(costs, spans, count)
        assert len(found) <= count
        assert [block for part in found for block in part.blocks] == list(range(1 + max(last for _, last in spans)))
        assert sorted(span for part in found for span in part.spans) == spans
        for part in found:
            assert part.blocks or part.spans
            # What is read here ended at one of these blocks, or at the last one of the slice before.
            assert all(part.blocks.start - 1 <= last < part.blocks.stop for _, last in part.spans)


def test_readers_of_the_same_blocks_stay_together_and_count_each():
    (alone, rest) = slices([1, 1, 1, 1, 1], [(0, 0), (0, 0), (4, 4)], 2)
    assert (alone.blocks, alone.spans) == (range(1), ((0, 0),))
    assert (rest.blocks, rest.spans) == (range(1, 5), ((4, 4),))


def test_without_readers_there_is_nothing_to_share():
    assert slices([1, 1], [], 4) == []


def test_slices_are_never_worse_than_whole_teachers_with_some_segments_each():
    chance = random.Random(1)
    for _ in range(100):
        cuts = sorted(chance.sample(range(21), 2 * chance.randint(1, 8)))
        spans = [(first, last - 1) for first, last in zip(cuts[::2], cuts[1::2], strict=True)]
        for count in (2, 4, 8):
            shares = [spans[rank::count] for rank in range(count) if spans[rank::count]]
            whole = max(1 + own[-1][1] + 3 * len(own) for own in shares)
            assert max(work([1] * 20, part) for part in slices([1] * 20, spans, count)) <= whole


def test_eight_slices_do_nine_tenths_of_eight_times_the_work():
    """Of Qwen-Image's sixty equal blocks with the paper's intervals, in batches per forward of a block."""
    spans = [(interval.first, interval.last) for interval in Recipe.load("paper_qwen_image").intervals.given]
    assert len(spans) == 13
    one = alone(spans)
    assert sliced(spans, 1) == pytest.approx(one)
    assert sliced(spans, 8) / one >= 0.9 * 8
    assert by_segments(spans, 8) / one == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("name", sorted(pipelines.TEACHERS))
@torch.no_grad()
def test_costs_are_those_of_the_blocks_themselves(name):
    make, adapter, inputs = pipelines.TEACHERS[name]
    transformer, counted, before = make(), [], None
    for stack in adapter.stacks:
        calls = stack_calls(transformer, adapter, stack.path, inputs[0], before)
        before = calls.streams
        for block, arguments in zip(stack.blocks(transformer), calls.arguments, strict=True):
            # Fused attention on the CPU is not counted.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                run_block(block, stack, arguments, calls.streams)
            counted.append(counter.get_total_flops())
    assert block_costs(transformer, adapter, inputs[0]) == counted
    assert all(not parameter.is_meta for parameter in transformer.parameters())
