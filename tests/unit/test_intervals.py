import tempfile
from pathlib import Path

import pytest
import torch
from families import TRANSFORMERS
from tiny import flux_inputs, flux_transformer

import ppcl_toolkit.artifacts.passes as passes
from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, TextRun
from ppcl_toolkit.recipe import Intervals, Recipe
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Reading, Runner
from ppcl_toolkit.stages.intervals import Candidates, _doubts, detect, find_intervals
from ppcl_toolkit.statistics import chains
from ppcl_toolkit.statistics.cka import cka, heatmap
from ppcl_toolkit.statistics.trend import differences, text_runs, threshold_intervals, trend_intervals

FLUX = load_adapter("flux")
DUAL, SINGLE = FLUX.stacks


def curve(depth, rises):
    """A delta [M, M] that falls along every row, except for a rise at column `rises[u]` of row u."""
    delta = torch.zeros(depth, depth)
    for u in range(depth):
        for k in range(u + 1, depth):
            delta[u, k] = 1.0 - 0.01 * k + (0.5 if k == rises.get(u) else 0.0)
    return delta


def algorithm_1(delta, start=1):
    """Lines 4 to 15 of the pseudo-code with its own numbers, from 1; a missing v is the end of the stack."""
    found = set()
    m = len(delta)
    u = start
    while u <= m:
        values = {k: float(delta[u - 1, k - 1]) for k in range(u + 1, m + 1)}
        v = None
        for k in range(u + 2, m + 1):
            if values[k] > values[k - 1]:
                v = k - 1
                break
        if v is None:
            v = m
        found |= {(u, v)}
        u = v + 1
    return sorted(found)


def test_trend_is_the_example_of_algorithm_2():
    # In the paper's numbers, from 1: start at u = 3, a rise at k = 5 gives [3, 4], and the search goes on at 5.
    delta = curve(7, {2: 4, 4: 6})
    assert trend_intervals(delta, first_block=2) == [(2, 3), (4, 5), (6, 6)]
    assert algorithm_1(delta, start=3) == [(3, 4), (5, 6), (7, 7)]


def test_trend_without_a_rise_ends_with_the_stack():
    assert trend_intervals(curve(6, {})) == [(0, 5)]
    assert trend_intervals(curve(6, {}), first_block=4) == [(4, 5)]
    assert trend_intervals(curve(6, {}), first_block=6) == []


def test_trend_takes_the_first_rise_and_no_plateau():
    delta = torch.zeros(6, 6)
    delta[0] = torch.tensor([0.0, 0.3, 0.3, 0.2, 0.4, 0.1])
    assert trend_intervals(delta) == [(0, 3), (4, 5)]
    # The first difference has none before it: a rise at k = u + 1 does not exist.
    delta[0] = torch.tensor([0.0, 9.0, 0.2, 0.3, 0.1, 0.1])
    assert trend_intervals(delta)[0] == (0, 2)


@pytest.mark.parametrize("depth, expected", [(0, []), (1, [(0, 0)]), (2, [(0, 1)])])
def test_trend_of_short_stacks(depth, expected):
    assert trend_intervals(torch.zeros(depth, depth)) == expected


@pytest.mark.parametrize("seed", range(30))
def test_trend_is_the_pseudo_code_in_the_papers_numbers(seed):
    g = torch.Generator().manual_seed(seed)
    depth = int(torch.randint(1, 25, (), generator=g))
    start = int(torch.randint(0, depth, (), generator=g))
    delta = torch.rand(depth, depth, generator=g)
    found = trend_intervals(delta, start)
    assert [(u + 1, v + 1) for u, v in found] == algorithm_1(delta, start + 1)
    assert [block for u, v in found for block in range(u, v + 1)] == list(range(start, depth))


def test_differences_are_equation_4():
    table = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).triu(1) + torch.eye(5)
    delta = differences(table)
    for u in range(5):
        for k in range(5):
            expected = -(table[u, k] - table[u, k - 1]) if k > u else 0.0
            assert delta[u, k] == expected
    assert delta[2, 3] == 1 - table[2, 3]


def test_threshold_takes_the_last_block_that_is_alike():
    table = torch.zeros(6, 6)
    table[0] = torch.tensor([1.0, 0.99, 0.9, 0.98, 0.5, 0.5])
    table[4, 5] = 0.97
    assert threshold_intervals(table, 0.97) == [(0, 3), (4, 5)]
    assert threshold_intervals(table, 0.98) == [(0, 3), (4, 4), (5, 5)]
    assert threshold_intervals(table, 0.97, first_block=1) == [(1, 1), (2, 2), (3, 3), (4, 5)]


def test_text_runs_are_maximal_and_deepest_first():
    table = torch.eye(7)
    for r, p in [(0, 1), (3, 4), (3, 5), (3, 6), (4, 5), (4, 6), (5, 6), (2, 5), (2, 6)]:
        table[r, p] = table[p, r] = 0.9995
    # Block 2 is like 5 and 6, but not like 3.
    assert text_runs(table) == [(3, 6), (0, 1)]
    assert text_runs(table, threshold=0.9996) == []
    assert text_runs(torch.ones(4, 4)) == [(0, 3)]
    assert text_runs(torch.eye(1)) == []


def test_text_runs_only_compare_with_their_reference():
    table = torch.eye(3)
    table[0, 1:] = table[1:, 0] = 0.9995
    assert text_runs(table) == [(0, 2)]


def batches(start, stop):
    for step in range(start, stop):
        yield flux_inputs(batch=2, seed=step)


def probe_weights(transformer):
    """Any maps will do: Eq. 3 is tested, not their fit."""
    g = torch.Generator().manual_seed(3)
    return {
        (stack.path, block, stream): 0.2 * torch.randn(32, 32, generator=g)
        for stack in FLUX.stacks
        for block in range(len(stack.blocks(transformer)))
        for stream in stack.streams
    }


SILENT = Desk(Path("nowhere"), lambda *_: None)
"""Nothing is written in the first five minutes."""


def found(transformer, placement=None, kind=Runner, **settings):
    runner = kind(transformer, FLUX, placement or Placement())
    settings = Intervals(**{"batches": 3, **settings})
    return find_intervals(runner, batches, settings, probe_weights(transformer), SILENT)


def outputs(transformer, stack, stream, given=None):
    """Outputs [B, N, D] of every block over all batches, by plain hooks."""
    seen = []
    position = stack.returns.index(stream)
    handles = [
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[position]))
        for block in stack.blocks(transformer)
    ]
    with torch.no_grad():
        for batch in given or batches(0, 3):
            transformer(**batch)
    for handle in handles:
        handle.remove()
    depth = len(handles)
    return [torch.cat(seen[block::depth]) for block in range(depth)]


def test_curves_are_equations_3_and_4_on_a_real_transformer():
    transformer = flux_transformer(dual=3, single=3)
    weights, curves = probe_weights(transformer), found(transformer).curves
    for stack in FLUX.stacks:
        for stream in stack.streams:
            blocks = outputs(transformer, stack, stream)
            table = torch.eye(3, dtype=torch.float64)
            for u in range(3):
                x = blocks[u]
                for k in range(u + 1, 3):
                    x = x + x @ weights[stack.path, k, stream].T
                    table[u, k] = cka(blocks[u], x).mean()
            pairs = heatmap(blocks)
            if (stack, stream) == (SINGLE, "text"):
                # Nobody reads it behind the last block.
                table[:2, 2] = pairs[:2, 2] = pairs[2, :2] = 0.0
            of = curves[stack.path][stream]
            torch.testing.assert_close(of.cka, table, atol=1e-5, rtol=0)
            torch.testing.assert_close(of.delta, differences(table), atol=2e-5, rtol=0)
            torch.testing.assert_close(of.heatmap, pairs, atol=1e-5, rtol=0)
        both = curves[stack.path]
        for name in ("cka", "heatmap"):
            mean = sum(getattr(both[stream], name) for stream in stack.streams) / 2
            if stack is SINGLE:
                mean[:, 2] = getattr(both["image"], name)[:, 2]
                mean[2] = getattr(both["image"], name)[2]
            torch.testing.assert_close(getattr(both["mean"], name), mean)
        torch.testing.assert_close(both["mean"].delta, differences(both["mean"].cka))


def test_intervals_are_algorithm_1_on_the_chosen_stream():
    transformer = flux_transformer(dual=5, single=4)
    for stream in ("image", "text", "mean"):
        candidates = found(transformer, stream=stream, first_block={DUAL.path: 1})
        for path, first in ((DUAL.path, 1), (SINGLE.path, 0)):
            spans = trend_intervals(candidates.curves[path][stream].delta, first)
            expected = [Interval(stack=path, first=u, last=v) for u, v in spans if u < v]
            assert list(candidates.intervals[path]) == expected
    table = candidates.curves[DUAL.path]["mean"].cka
    loose = found(transformer, stream="mean", strategy="threshold", threshold=0.0)
    assert loose.intervals[DUAL.path] == (Interval(stack=DUAL.path, first=0, last=4),)
    strict = found(transformer, stream="mean", strategy="threshold", threshold=1.0)
    assert table[0, 4] < 1 and strict.intervals[DUAL.path] == ()


def test_streamed_and_resident_curves_are_the_same_bits():
    transformer = flux_transformer(dual=3, single=2)
    streamed = Placement(chunk=2, streamed=True)
    one, other = found(transformer), found(transformer, streamed)
    for path, streams in one.curves.items():
        for stream, curves in streams.items():
            assert all(torch.equal(a, b) for a, b in zip(curves, other.curves[path][stream], strict=True))


def test_text_runs_are_only_searched_where_text_has_its_own_weights():
    transformer = flux_transformer(dual=4, single=4)
    runs = find_intervals(
        Runner(transformer, FLUX),
        batches,
        Intervals(batches=1),
        probe_weights(transformer),
        SILENT,
        text_threshold=0.0,
    ).text_runs
    assert runs == (TextRun(stack=DUAL.path, reference=0, last=3),)


def test_text_runs_reach_the_last_block_whose_own_text_nobody_reads():
    """What a run needs of it is the text that it reads, and that comes from the block before."""
    transformer, adapter, batch = TRANSFORMERS["qwenimage"]()
    g = torch.Generator().manual_seed(3)
    weights = {
        (adapter.stacks[0].path, block, stream): 0.2 * torch.randn(32, 32, generator=g)
        for block in range(4)
        for stream in ("image", "text")
    }

    def references(threshold):
        """Of runs that end with the stack."""
        run, settings = Runner(transformer, adapter), Intervals(batches=1)
        found = find_intervals(run, lambda *_: [batch], settings, weights, SILENT, text_threshold=threshold)
        return [each.reference for each in found.text_runs if each.last == 3]

    assert references(0.0) == [0]
    like = float(cka(*outputs(transformer, adapter.stacks[0], "text", [batch])[1:3]).mean())
    assert references(like - 1e-4) in ([1], [2])
    assert references(like + 1e-4) == []


def test_given_intervals_are_taken_and_curves_are_still_drawn():
    given = (Interval(stack=SINGLE.path, first=0, last=1), Interval(stack=DUAL.path, first=1, last=2))
    candidates = found(flux_transformer(dual=3, single=2), strategy="given", given=given)
    assert candidates.intervals == {DUAL.path: given[1:], SINGLE.path: given[:1]}
    assert candidates.curves[DUAL.path]["image"].cka.shape == (3, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"given": (Interval(stack="blocks", first=0, last=1),)}, "no stack 'blocks'"),
        ({"given": (Interval(stack=DUAL.path, first=1, last=2),)}, r"transformer_blocks\[1,2\].*blocks 0 to 1"),
        ({"given": (Interval(stack=DUAL.path, first=1, last=1),)}, "first below last"),
        ({"first_block": {"single": 1}}, "no stack 'single'"),
    ],
)
def test_settings_that_name_nothing_are_errors_before_anything_runs(settings, message):
    class Never(Runner):
        def feed(self, *_, **__):
            raise AssertionError("the teacher ran")

    with pytest.raises(PpclError, match=message):
        found(flux_transformer(dual=2, single=2), kind=Never, strategy="given", **settings)


def test_a_last_block_without_text_leaves_the_mean_to_the_image():
    class WithoutLastText(Runner):
        def feed(self, batches, readers, **_):
            g = torch.Generator().manual_seed(0)
            for number, _batch in enumerate(batches):
                for reader in readers:
                    out = Streams(torch.randn(2, 40, 32, generator=g), torch.randn(2, 40, 32, generator=g))
                    reader.read(Reading({}, out, Streams(out.image) if reader.last == 2 else out))
                yield number + 1

    curves = found(flux_transformer(dual=3, single=3), kind=WithoutLastText).curves[DUAL.path]
    assert not curves["text"].cka[:2, 2].any() and not curves["text"].heatmap[2, :2].any()
    assert torch.equal(curves["mean"].cka[:, 2], curves["image"].cka[:, 2])
    torch.testing.assert_close(curves["mean"].cka[0, 1], (curves["image"].cka + curves["text"].cka)[0, 1] / 2)


def test_it_is_known_of_how_many_samples_a_heatmap_is(monkeypatch):
    transformer = flux_transformer(dual=3, single=2)
    assert {s for own in found(transformer).compared.values() for s in own.values()} == {(6, 6)}
    monkeypatch.setattr(chains, "_HELD", 1)
    compared = found(transformer).compared
    assert compared == {stack.path: {"image": (2, 6), "text": (2, 6)} for stack in FLUX.stacks}


def test_parts_of_the_calibration_set_and_other_streams_are_what_runs_on_them_find():
    transformer = flux_transformer(dual=5, single=6)
    whole, mean = (found(transformer, batches=8, stream=stream) for stream in ("image", "mean"))

    def alone(start, stop, stream="image"):
        def part(first, last):
            return batches(start + first, start + last)

        settings = Intervals(batches=stop - start, stream=stream)
        with tempfile.TemporaryDirectory() as folder:
            desk = Desk(Path(folder), lambda *_: None)
            return find_intervals(Runner(transformer, FLUX), part, settings, probe_weights(transformer), desk)

    halves = {"the first half": alone(0, 4), "the second half": alone(4, 8), "a quarter": alone(0, 2)}
    for stack in FLUX.stacks:
        expected = {name: spans(each, stack) for name, each in halves.items()}
        expected |= by_timestep(transformer, stack)
        expected["text stream"] = spans(found(transformer, batches=8, stream="text"), stack)
        assert whole.elsewhere[stack.path] == expected
        assert mean.elsewhere[stack.path]["image stream"] == spans(whole, stack)
    # Resampled by hand, from the curve of each batch by itself.
    single = [alone(number, number + 1) for number in range(8)]
    draws = torch.randint(8, (200, 8), generator=torch.Generator().manual_seed(0))
    for stack in FLUX.stacks:
        curves = torch.stack([each.curves[stack.path]["image"].cka for each in single])
        again = [trend_intervals(differences(curves[drawn].mean(0))) for drawn in draws]
        shares = [sum(span in each for each in again) / 200 for span in spans(whole, stack)]
        assert whole.stability[stack.path] == pytest.approx(shares)
        assert len(shares) == len(whole.intervals[stack.path])


def by_timestep(transformer, stack):
    """Intervals of the eight samples with the lowest timesteps and of the other eight, every CKA by itself."""
    weights, given = probe_weights(transformer), list(batches(0, 8))
    order = torch.cat([batch["timestep"] for batch in given]).argsort()
    blocks = outputs(transformer, stack, "image", given)
    expected = {}
    for name, half in (("lower timesteps", order[:8]), ("higher timesteps", order[8:])):
        table = torch.eye(len(blocks), dtype=torch.float64)
        for u, block in enumerate(blocks):
            x = block[half]
            for k in range(u + 1, len(blocks)):
                x = x + x @ weights[stack.path, k, "image"].T
                table[u, k] = sum(cka(block[half][i : i + 1], x[i : i + 1]).item() for i in range(8)) / 8
        found_spans = trend_intervals(differences(table))
        expected[name] = tuple((u, v) for u, v in found_spans if u < v)
    return expected


def spans(candidates, stack):
    return tuple((i.first, i.last) for i in candidates.intervals[stack.path])


def test_an_interval_that_is_rarely_found_again_is_a_warning():
    one, other = (Interval(stack="a", first=first, last=first + 1) for first in (0, 2))
    candidates = Candidates({"a": (one, other), "b": ()}, (), {}, stability={"a": (0.9, 0.31), "b": ()})
    (said,) = _doubts(candidates, 5)
    assert said == (
        "a: 1 of 2 intervals are found in less than half of resampled calibration sets ([2,3] 31%) and rest on noise: "
        "intervals.batches is 5"
    )


def test_saved_is_loaded(tmp_path):
    candidates = found(flux_transformer(dual=3, single=2), strategy="threshold", threshold=0.0)
    candidates.save(tmp_path)
    loaded = Candidates.load(tmp_path)
    assert loaded.intervals == candidates.intervals
    assert loaded.text_runs == candidates.text_runs
    assert loaded.compared == candidates.compared
    assert list(loaded.intervals) == [DUAL.path, SINGLE.path]
    for path, streams in candidates.curves.items():
        assert set(loaded.curves[path]) == set(streams) == {"image", "text", "mean"}
        for stream, curves in streams.items():
            assert all(torch.equal(a, b) for a, b in zip(curves, loaded.curves[path][stream], strict=True))


class Killed(Exception):
    pass


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_killed_search_goes_on_to_the_same_bits(tmp_path, monkeypatch, at, streamed):
    transformer = flux_transformer(dual=3, single=2)
    runner = Runner(transformer, FLUX, Placement(chunk=2 if streamed else 1, streamed=streamed))
    target = {"name": "half", "params": "50%"}
    recipe = Recipe.model_validate({"teacher": {"path": "x"}, "intervals": {"batches": 5}, "targets": [target]})
    weights = probe_weights(transformer)
    whole = find_intervals(runner, batches, recipe.intervals, weights, SILENT)
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    asked = []

    def recorded(start, stop):
        asked.append(start)
        return batches(start, stop)

    def kill(done, _):
        if done >= at:
            raise Killed

    with pytest.raises(Killed):
        detect(runner, recorded, weights, recipe, Desk(tmp_path, kill))
    detect(runner, recorded, weights, recipe, Desk(tmp_path, lambda *_: None))
    # Nothing is done twice.
    assert asked == list(range(5))
    again = Candidates.load(tmp_path)
    assert (again.intervals, again.text_runs) == (whole.intervals, whole.text_runs)
    for path, streams in whole.curves.items():
        for stream, curves in streams.items():
            assert all(torch.equal(a, b) for a, b in zip(curves, again.curves[path][stream], strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.json", "curves.safetensors"]


def test_what_a_narrow_teacher_hands_on_is_known_after_a_kill(tmp_path, monkeypatch):
    class WithZ(Runner):
        """Behind block 2, z travels behind the text."""

        def feed(self, batches, readers, **_):
            for number, _batch in enumerate(batches):
                for reader in readers:
                    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(number))
                    own = Streams(x, torch.cat([x, x], dim=1) if reader.last == 2 else x)
                    reader.read(Reading({}, own, own, text_tokens=40))
                yield number + 1

    def ends(desk):
        runner = WithZ(flux_transformer(dual=3, single=3), FLUX, Placement())
        settings = Intervals(batches=2, strategy="threshold", threshold=0.0)
        return find_intervals(runner, batches, settings, probe_weights(runner.transformer), desk).intervals

    def kill(done, _):
        if done == 2:
            raise Killed

    whole = ends(SILENT)
    assert whole[DUAL.path] == (Interval(stack=DUAL.path, first=0, last=1),)
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    with pytest.raises(Killed):
        ends(Desk(tmp_path, kill))
    assert ends(Desk(tmp_path, lambda *_: None)) == whole
