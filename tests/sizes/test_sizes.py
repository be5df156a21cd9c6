"""Plans are held to counts: the real code of a stage at full size, on tensors without data, within a tenth."""

import importlib.util
import os
from pathlib import Path

import count
import pytest

HERE = Path(__file__).parent
WITHIN = 0.1
WHOLE = {
    "depth, streamed": ["--recipe", "flux_8b", "--stage", "depth", "--published", "--streamed"],
}
"""Models with all of their blocks."""
SHALLOW = [
    *(
        ("flux_8b", stage, *schedule)
        for stage in ("samples", "probe", "select", "depth", "velocities", "evaluate")
        for schedule in ((), ("--streamed",))
    ),
    ("flux_8b", "finetune"),
    ("flux_8b", "export"),
    ("qwen_image_10b", "width"),
    ("qwen_image_10b", "finetune"),
    ("qwen_image_10b", "evaluate"),
    ("sd35_large_5b", "depth", "--streamed"),
    ("sd35_medium_twice_as_fast", "export"),
    ("flux2_klein_3b", "probe", "--streamed"),
    ("z_image_4_6b", "velocities"),
    ("chroma_6_9b", "depth"),
    ("wan_1b", "probe"),
]
"""A few blocks of each stack, as wide as they are; `count.py --all` has more stages of them."""
FEW = "8"
CASES = WHOLE | {
    ", ".join([*case, "few blocks"]): ["--recipe", case[0], "--stage", case[1], *case[2:], "--blocks", FEW]
    for case in SHALLOW
}
WRITTEN = {
    "samples": ["flux_8b, samples, few blocks"],
    "probes": ["flux_8b, probe, few blocks"],
    "velocities": ["flux_8b, velocities, few blocks"],
    "students": ["flux_8b, finetune, few blocks"],
    "bank": ["depth, streamed"],
}
"""What a run leaves on the disk, and the cases that write it."""


@pytest.fixture(scope="module", autouse=True)
def _guarded():
    """Autograd needs a guard of the device that tensors claim: that of the pretended GPU, where it can be built."""
    spec = importlib.util.spec_from_file_location("pretend_device", HERE.parent / "pretend" / "device.py")
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    lacks = device.missing()
    if lacks and os.environ.get("PPCL_REQUIRE_PRETEND"):
        pytest.fail(f"PPCL_REQUIRE_PRETEND is set, and there is no pretended GPU: {lacks}")
    if lacks:
        pytest.skip(f"no pretended GPU: {lacks}")
    device.build()


@pytest.fixture(scope="module")
def counter():
    made = count.Counter()
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES)
def test_a_plan_says_what_is_counted(case, counter):
    found, plan = count.both(counter, CASES[case])
    for place in ("device", "host"):
        said = f"{place}: counted {found[place] / 1e9:.3f} GB at {found[f'{place}_line']}"
        assert plan[place] == pytest.approx(found[place], rel=WITHIN), said


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_plan_says_what_is_written(kind, counter):
    found = [count.both(counter, CASES[case]) for case in WRITTEN[kind]]
    (planned,) = {plan["disk"][kind] for _, plan in found}
    assert planned == pytest.approx(sum(counted["disk"] for counted, _ in found), rel=WITHIN)


def test_a_plan_says_what_states_take_while_one_takes_the_place_of_another(counter):
    found = [count.both(counter, CASES[f"flux_8b, {stage}, few blocks"]) for stage in ("probe", "depth", "finetune")]
    states = max(counted["states"] for counted, _ in found)
    assert found[0][1]["disk"]["states"] == pytest.approx(states, rel=WITHIN)


def test_eight_devices_write_as_a_plan_says(counter):
    """Each process has batches of its own to fine-tune on."""
    eight = ["--recipe", "flux_8b", "--stage", "velocities", "--blocks", FEW, "--devices", "8", "--rank", "3"]
    answers, plan = count.both(counter, eight)
    assert plan["disk"]["velocities"] == pytest.approx(8 * answers["disk"], rel=WITHIN)
