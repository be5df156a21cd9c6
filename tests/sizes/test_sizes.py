"""Plans are held to counts: the real code of a stage at full size, on tensors without data, within a tenth."""

import collections
import importlib.util
import os
from pathlib import Path

import count
import pytest

HERE = Path(__file__).parent
WITHIN = 0.1
DEPTH_ALONE = ("--set", "modulation=null", "--set", "targets=[{name: 5b, params: 5B, width: false}]")
WHOLE = {
    "probe": ["--recipe", "paper_flux", "--stage", "probe"],
    "probe, one of eight": ["--recipe", "paper_qwen_image", "--stage", "probe", "--devices", "8", "--rank", "5"],
    "select, measured together, streamed": [
        *("--recipe", "flux_8b", "--stage", "select", "--published", "--streamed"),
        *("--set", "select.order=program", "--set", "select.batches=1"),
    ],
    "depth": ["--recipe", "qwen_image_10b", "--stage", "depth", "--published"],
    "depth, streamed": ["--recipe", "flux_8b", "--stage", "depth", "--published", "--streamed"],
    "depth, one of eight": ["--recipe", "flux_8b", "--stage", "depth", "--published", "--devices", "8", "--rank", "4"],
    "depth of a model whose last block differs": ["--recipe", "sd35_large_5b", "--stage", "depth", *DEPTH_ALONE],
    "width, streamed": ["--recipe", "qwen_image_10b", "--stage", "width", "--streamed", "--published"],
    "answers": ["--recipe", "flux_8b", "--stage", "velocities", "--streamed"],
    "fine-tuning by what fits 24 GB": ["--recipe", "flux_8b", "--stage", "finetune", "--published", "--card", "24"],
    "modulation": ["--recipe", "qwen_image_light", "--stage", "modulation"],
    "modulation, streamed": ["--recipe", "flux_light", "--stage", "modulation", "--streamed"],
    "export": ["--recipe", "flux_8b", "--stage", "export", "--published"],
    "evaluation": ["--recipe", "flux_8b", "--stage", "evaluate"],
}
"""Models with all of their blocks."""
STAGES = ("check", "samples", "probe", "intervals", "select", "depth", "width", "velocities", "evaluate")
SHALLOW = [
    *(
        (recipe, stage, *options)
        for recipe in ("flux_8b", "qwen_image_10b")
        for stage in STAGES
        for options in ((), ("--streamed",))
        if (recipe, stage) != ("flux_8b", "width")
    ),
    *((recipe, "finetune") for recipe in ("flux_8b", "qwen_image_10b")),
    *((recipe, "export") for recipe in ("flux_8b", "qwen_image_10b")),
    ("flux_8b", "samples", "--card", "17"),
    ("sd35_large_5b", "depth"),
    ("sd35_medium_twice_as_fast", "depth"),
    ("flux2_klein_3b", "depth"),
    ("z_image_4_6b", "probe"),
    ("wan_1b", "probe", "--streamed"),
]
"""Every stage, resident and streamed, and every family: a few blocks of each stack, as wide as they are."""
FEW = "8"
CASES = WHOLE | {
    ", ".join([*case, "few blocks"]): ["--recipe", case[0], "--stage", case[1], *case[2:], "--blocks", FEW]
    for case in SHALLOW
}
STAGES_THAT_WRITE = {
    "samples": "samples",
    "probe": "probes",
    "depth": "bank",
    "width": "bank",
    "velocities": "velocities",
    "finetune": "students",
}
"""And the part of the disk's plan that it is."""


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


@pytest.mark.parametrize("recipe", ["flux_8b", "qwen_image_10b", "sd35_large_5b"])
def test_a_plan_says_what_is_written(recipe, counter):
    left, states, plan = collections.Counter(), 0, {}
    for stage, kind in STAGES_THAT_WRITE.items():
        if stage == "samples" and recipe == "sd35_large_5b":  # its pipeline is not among those that are called here
            continue
        found, planned = count.both(counter, ["--recipe", recipe, "--stage", stage, "--blocks", FEW])
        left[kind] += found["disk"]
        states = max(states, found["states"])
        plan |= planned["disk"] if stage != "finetune" else {kind: planned["disk"][kind]}
    assert {kind: plan[kind] for kind in left} == pytest.approx(left, rel=WITHIN)
    assert plan["states"] == pytest.approx(states, rel=WITHIN)


def test_eight_devices_write_as_a_plan_says(counter):
    eight = ["--blocks", FEW, "--devices", "8", "--recipe", "flux_8b", "--stage"]
    answers, plan = count.both(counter, [*eight, "velocities", "--rank", "3"])
    assert plan["disk"]["velocities"] == pytest.approx(8 * answers["disk"], rel=WITHIN)
    banks = [counter([*eight, "depth", "--rank", str(rank)])["disk"] for rank in range(8)]
    assert plan["disk"]["bank"] == pytest.approx(sum(banks), rel=WITHIN)
