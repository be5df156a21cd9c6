"""Plans: every structural rule, and what forms they give."""

import pytest
from pydantic import ValidationError

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun, trained_forms

EMPTY = Plan(family="flux", depths={"a": 8, "b": 4})


def keys(*operations):
    return [form.key for form in EMPTY.with_operations(operations).forms()]


def test_an_empty_plan_keeps_every_block():
    assert keys() == [f"a.{i}-{i}" for i in range(8)] + [f"b.{i}-{i}" for i in range(4)]
    assert EMPTY.is_depth_only
    assert trained_forms([EMPTY]) == []


def test_an_interval_leaves_one_block():
    plan = EMPTY.with_operations([Interval(stack="a", first=2, last=4)])
    assert plan.kept() == {"a": [0, 1, 2, 5, 6, 7], "b": [0, 1, 2, 3]}
    assert [form.key for form in trained_forms([plan])] == ["a.2-4"]


def test_a_run_taps_its_reference_and_ends_at_its_last_block():
    plan = EMPTY.with_operations([Interval(stack="a", first=2, last=3), TextRun(stack="a", reference=2, last=6)])
    texts = {form.first: (form.text, form.reference) for form in plan.forms() if form.stack == "a"}
    # h comes from the end of the reference's interval, z from its beginning.
    assert texts[2] == ("tap", None)
    assert texts[4] == texts[5] == ("inside", (2, 3))
    assert texts[6] == ("end", (2, 3))
    assert texts[7] == ("own", None)


def test_a_bank_holds_every_wider_form_first():
    plan = EMPTY.with_operations(
        [
            Interval(stack="a", first=3, last=4),
            TextRun(stack="a", reference=2, last=5),
            FfnSwap(stack="a", block=3, streams=("image",)),
            FfnSwap(stack="a", block=2, streams=("image", "text")),
        ]
    )
    assert [form.key for form in trained_forms([plan])] == [
        "a.2-2.ffn_image_text",
        "a.3-4",
        "a.3-4.text_2-2_inside",
        "a.3-4.text_2-2_inside.ffn_image",
        "a.5-5.text_2-2_end",
    ]


@pytest.mark.parametrize(
    ("operations", "rule"),
    [
        ([Interval(stack="a", first=3, last=3)], "at least two blocks"),
        ([Interval(stack="a", first=6, last=8)], "blocks 0 to 7"),
        ([Interval(stack="c", first=0, last=1)], "no such stack"),
        ([Interval(stack="a", first=0, last=2), Interval(stack="a", first=2, last=3)], "overlap"),
        ([TextRun(stack="a", reference=0, last=3), TextRun(stack="a", reference=3, last=5)], "overlap"),
        ([Interval(stack="a", first=2, last=4), TextRun(stack="a", reference=3, last=6)], "reference is inside"),
        ([Interval(stack="a", first=2, last=4), TextRun(stack="a", reference=1, last=3)], "reaches further"),
        ([Interval(stack="a", first=2, last=4), TextRun(stack="a", reference=2, last=4)], "leave no block"),
        ([Interval(stack="a", first=2, last=4), FfnSwap(stack="a", block=3, streams=("image",))], "removed"),
        ([FfnSwap(stack="a", block=3, streams=("image",))] * 2, "twice"),
        ([FfnSwap(stack="a", block=3, streams=())], "no stream"),
        ([TextRun(stack="a", reference=1, last=3), FfnSwap(stack="a", block=2, streams=("text",))], "already removes"),
    ],
)
def test_a_broken_rule_is_named(operations, rule):
    with pytest.raises(ValidationError, match=rule):
        EMPTY.with_operations(operations)


def test_json_gives_back_the_same_plan(tmp_path):
    plan = EMPTY.with_operations(
        [Interval(stack="a", first=0, last=1), FfnSwap(stack="b", block=2, streams=("image",))]
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "{", '{"family": "flux"}', '{"version": 9, "family": "f", "depths": {}}'])
def test_a_broken_file_is_one_error(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PpclError, match="is not a plan"):
        Plan.load(tmp_path / "plan.json")


EARLIER = EMPTY.with_operations(
    [
        Interval(stack="a", first=0, last=1),
        TextRun(stack="a", reference=3, last=6),
        FfnSwap(stack="a", block=4, streams=("image",)),
        FfnSwap(stack="b", block=2, streams=("image", "text")),
    ]
)
STUDENT = {"a": 7, "b": 4}  # a: 0-1, 2, 3 tap, 4 inside, 5 inside, 6 end, 7


@pytest.mark.parametrize(
    ("first", "last", "fits"),
    [(0, 1, True), (1, 6, True), (2, 4, True), (3, 4, True), (0, 5, True), (2, 5, False), (4, 5, False), (1, 3, False)],
)
def test_composed_plans_leave_the_forms_that_the_first_one_had(first, last, fits):
    later = Plan(family="flux", depths=STUDENT).with_operations([Interval(stack="a", first=first, last=last)])
    if not fits:  # one block cannot stand where a run begins or ends
        with pytest.raises(ValueError, match="a text run begins or ends inside"):
            EARLIER.compose(later)
        return
    composed = EARLIER.compose(later)
    before = {stack: [form for form in EARLIER.forms() if form.stack == stack] for stack in STUDENT}
    after = {stack: [form for form in composed.forms() if form.stack == stack] for stack in STUDENT}
    for stack, kept in later.kept().items():
        wanted = [before[stack][index] for index in kept]
        assert [(f.first, f.ffn) for f in after[stack]] == [(f.first, f.ffn) for f in wanted]
        if (first, last) != (0, 5):
            assert [f.text for f in after[stack]] == [f.text for f in wanted]
    assert composed.depths == EMPTY.depths
    assert [entry["depths"] for entry in composed.history] == [EMPTY.depths, STUDENT]


def test_a_run_goes_with_the_interval_that_swallows_it_and_width_comes_on_top():
    later = Plan(family="flux", depths=STUDENT).with_operations(
        [
            Interval(stack="a", first=1, last=5),
            TextRun(stack="b", reference=0, last=1),
            FfnSwap(stack="a", block=6, streams=("image",)),
        ]
    )
    composed = EARLIER.compose(later)
    assert composed.intervals == (Interval(stack="a", first=0, last=1), Interval(stack="a", first=2, last=6))
    assert composed.text_runs == (TextRun(stack="b", reference=0, last=1),)
    assert {(swap.stack, swap.block) for swap in composed.ffn_swaps} == {("b", 2), ("a", 7)}
    again = composed.compose(Plan(family="flux", depths={"a": 3, "b": 4}))
    assert (again.operations, len(again.history)) == (composed.operations, 3)
    with pytest.raises(ValueError, match="later plan is for"):
        EARLIER.compose(EMPTY)
