"""Processes that share out a teacher do what one does, to the byte; and one of them may be killed."""

import copy
import math
from dataclasses import replace

import pipelines
import pytest
import torch
from runs import batches, runner

from ppcl_toolkit.artifacts.storage import Bank, load_tree
from ppcl_toolkit.running.capture import Streams, bind, joint_text, run_block, unpack
from ppcl_toolkit.running.passage import Ahead, Place
from ppcl_toolkit.running.pipelined import Baggage, Share
from ppcl_toolkit.training import distill
from ppcl_toolkit.training.losses import LOSSES

COUNTS = (2, 4)


def finished(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]


def files(folder):
    """Content by name; what a killed process was writing goes when its stage ends."""
    whole = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in whole}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    pipelines.everything(folder)
    return folder


@pytest.fixture(scope="module", params=COUNTS)
def together(request, tmp_path_factory):
    """What several make."""
    folder = tmp_path_factory.mktemp(f"together{request.param}")
    finished(pipelines.launched(request.param, "everything", folder))
    return folder


def test_several_processes_make_what_one_makes_byte_by_byte(alone, together):
    one, other = files(alone), files(together)
    assert len(one) > 40
    assert one.keys() == other.keys()
    assert [name for name, content in one.items() if content != other[name]] == []


@pytest.mark.parametrize("name", sorted(pipelines.TEACHERS))
@torch.no_grad()
def test_what_is_read_is_what_the_teacher_computes_by_itself(together, name):
    """Plain hooks on plain forwards see the same, also the text that a run takes from a reference."""
    make, adapter, inputs = pipelines.TEACHERS[name]
    for place in pipelines.PLACES[name]:
        transformer = make()
        seen = load_tree(together / "readings" / name / f"{'-'.join(map(str, place))}.safetensors")
        assert len(seen) == len(inputs)
        for reading, given in zip(seen, inputs, strict=True):
            inputs_, target, packed = watched(transformer, adapter.stack(place.stack), place, given)
            if place.last == len(adapter.stacks[-1].blocks(transformer)) - 1 and place.stack == adapter.stacks[-1].path:
                target = Streams(target.image)  # nobody reads its text
            assert all(same(*pair) for pair in zip(reading["in"], inputs_, strict=True))
            assert all(same(*pair) for pair in zip(reading["out"], target, strict=True))
            assert same(reading["packed"], packed)


def same(one, other):
    return one is other is None or torch.equal(one, other)


def watched(transformer, stack, place, given):
    """What goes into a place and comes out of it in a forward of the whole transformer, and the text of Eq. 8."""
    blocks, seen, packed = stack.blocks(transformer), {}, None
    first, last = place.reference or (place.first, place.last)
    hooks = [
        blocks[place.first].register_forward_pre_hook(
            lambda block, args, kwargs: seen.update(into=bind(block, stack, args, kwargs)[1]), with_kwargs=True
        ),
        blocks[place.last].register_forward_hook(lambda _, __, output: seen.update(out=unpack(stack, output))),
        blocks[last].register_forward_hook(lambda _, __, output: seen.update(h=unpack(stack, output).text)),
    ]
    if place.reference:
        with joint_text(blocks[first], stack) as z:
            transformer(**given)
        packed = torch.cat([seen["h"], z[0]], dim=1)
    else:
        transformer(**given)
    for hook in hooks:
        hook.remove()
    return seen["into"], seen["out"], packed


def test_the_path_of_students_goes_on_in_the_next_process(together):
    first, second, third = (
        load_tree(together / "readings" / "follow" / f"{'-'.join(map(str, place))}.safetensors")
        for place in pipelines.PATH
    )
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(b["in"][0], a["out"][0] + 1)
        assert not torch.equal(c["in"][0], a["out"][0])


def test_a_student_is_what_a_plain_loop_makes_of_it(together):
    """No engine, no stage: forwards of the whole teacher with hooks, and an optimizer."""
    bank, steps, rate = Bank(together / "depth" / "teacher"), 6, 1e-3
    for interval in pipelines.INTERVALS:
        run = runner()
        stack = run.adapter.stack(interval.stack)
        student = copy.deepcopy(run.blocks(stack.path)[interval.first]).float().requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.02)
        for step in range(steps):
            arguments, into, target = called(run.transformer, stack, interval, batches()[step])
            output = run_block(student, stack, arguments, into)
            if stack is run.adapter.stacks[-1] and interval.last == len(run.blocks(stack.path)) - 1:
                target = Streams(target.image)  # nobody reads its text
            LOSSES["direction"](output, target).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            # One step of warm-up, then a cosine.
            optimizer.param_groups[0]["lr"] = rate * (0.5 * (1 + math.cos(math.pi * (step - 1) / 5)) if step else 1)
            optimizer.step()
            optimizer.zero_grad()
        banked = bank[f"{interval.stack}.{interval.first}-{interval.last}"]
        assert all(torch.equal(value, banked[name]) for name, value in student.state_dict().items())


@torch.no_grad()
def called(transformer, stack, interval, batch):
    blocks, seen = stack.blocks(transformer), {}

    def before(block, args, kwargs):
        seen["arguments"], seen["into"] = bind(block, stack, args, kwargs)

    hooks = [
        blocks[interval.first].register_forward_pre_hook(before, with_kwargs=True),
        blocks[interval.last].register_forward_hook(lambda _, __, output: seen.update(out=unpack(stack, output))),
    ]
    transformer(**batch)
    for hook in hooks:
        hook.remove()
    return seen["arguments"], seen["into"], seen["out"]


@pytest.mark.parametrize(("how", "count"), [("mixed", 2), ("teacher", None)])
def test_one_of_four_is_killed_and_another_number_goes_on_to_the_same_bytes(alone, tmp_path, how, count):
    folder = tmp_path / "depth"
    process = pipelines.launched(4, "doomed", folder, "1", "5", how)
    process.communicate(timeout=400)
    assert process.returncode != 0
    assert (tmp_path / "depth.killed").exists()
    # Each of the three segments was on its way in another process.
    assert len(pipelines.parts_of(folder)) == 3
    assert not (folder / "losses.json").exists()
    if count is None:
        asked = []
        pipelines.deep(folder, how, wrap=lambda noised: Noting(noised, asked))
        # The very first is the example by which slices are balanced.
        assert asked in ([0, 2, 3, 4, 5], [0, 4, 5])
    else:
        finished(pipelines.launched(count, "deep", folder, how))
    assert files(folder) == files(alone / "depth" / how)


@pytest.mark.parametrize(("at", "count"), [("3", 4), ("6", 4), ("6", 2)])
def test_probes_go_on_after_a_process_was_killed_among_their_sums_or_in_training(alone, tmp_path, at, count):
    folder = tmp_path / "probes"
    pipelines.launched(4, "doomed", folder, "1", at, "probes").communicate(timeout=400)
    assert (tmp_path / "probes.killed").exists()
    assert list(folder.glob("state-sums-*-of-4.safetensors.tmp")) and not (folder / "probes.safetensors").exists()
    finished(pipelines.launched(count, "probes", folder))
    assert files(folder) == files(alone / "probes" / "flux")


def test_what_a_reader_has_taken_it_lets_pass():
    taken, (name, places) = [], ("flux", pipelines.PLACES["flux"])
    recorder = pipelines.Recorder(pipelines.TEACHERS[name][1], places[0])
    late = Ahead(recorder, 2)
    for number in range(5):
        late.read(number)
        taken.append(list(recorder.seen))
    assert taken == [[], [], [2], [2, 3], [2, 3, 4]]
    assert Place.of(late) == places[0]


def test_a_process_is_at_later_batches_while_the_next_is_at_this_one(tmp_path):
    """The last reader would wait for ever where a batch had to arrive before the next one begins."""
    finished(pipelines.launched(2, "overlapping", tmp_path))
    assert len(list(tmp_path.glob("begun-*"))) == pipelines.BATCHES


class Noting:
    """Batches that note which of them are asked for."""

    def __init__(self, noised, asked):
        self._noised, self._asked = noised, asked

    def __getitem__(self, number):
        self._asked.append(number)
        return self._noised[number]


def shares(monkeypatch, ranks, costs, depths, places):
    found = []
    for rank in range(ranks):
        monkeypatch.setattr("ppcl_toolkit.processes.world", lambda rank=rank: (rank, ranks))
        found.append(Share.of(costs, depths, places))
    return found


def test_a_share_knows_what_comes_in_and_what_goes_out(monkeypatch):
    places = [Place("a", 0, 2), Place("a", 1, 1), Place("a", 3, 3, (0, 1)), Place("b", 0, 0)]
    found = shares(monkeypatch, 3, [1] * 6, {"a": 4, "b": 2}, places)
    assert [block for share in found for block in share.blocks] == list(range(5))
    for one, other in zip(found, found[1:], strict=False):
        assert one.outgoing == other.incoming
    assert found[0].incoming is None
    assert found[-1].outgoing is None
    assert found[0].blocks == range(2)
    # Of the blocks behind it the next process needs what went into block 0, and the text of block 0 and block 1.
    assert found[0].outgoing == Baggage(opened=(0,), z=(0,), h=(1,))


def test_a_process_holds_its_slice_and_the_blocks_of_its_readers(monkeypatch):
    depths = {"a": 8, "b": 2}
    places = [Place("a", 0, 5), Place("a", 6, 7), Place("b", 0, 1)]
    found = shares(monkeypatch, 4, [1] * 10, depths, places)
    held = [share.held(depths) for share in found]
    assert set.union(*held) == {(stack, block) for stack, depth in depths.items() for block in range(depth)}
    for share, own in zip(found, held, strict=True):
        readers = [place for place in places if place[:3] in share.mine]
        of_readers = {(place.stack, block) for place in readers for block in range(place.first, place.last + 1)}
        assert len(own - of_readers) <= len(share.blocks) <= 6
        assert len(own) < 10


def test_more_processes_than_work_leave_some_idle(monkeypatch):
    found = shares(monkeypatch, 4, [1, 1], {"a": 2}, [Place("a", 0, 0)])
    assert [len(share.blocks) for share in found] == [1, 0, 0, 0]
    assert [len(share.mine) for share in found] == [0, 1, 0, 0]
    assert {share.idle for share in found} == {2}
    assert found[2].blocks == range(0)
    assert distill._idle(replace(runner(), share=found[3]))[0].startswith("2 processes had nothing to do")
