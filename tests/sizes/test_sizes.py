"""Plans are held to counts: the real code of a stage at full size, on tensors without data, within a tenth."""

import importlib.util
import os
from pathlib import Path

import count
import pytest

HERE = Path(__file__).parent
WITHIN = 0.1
WHOLE = {
    "probe": ["--recipe", "flux_8b", "--stage", "probe"],
    "probe, one of eight": ["--recipe", "qwen_image_10b", "--stage", "probe", "--devices", "8", "--rank", "5"],
    "select, measured together, streamed": [
        *("--recipe", "flux_8b", "--stage", "select", "--published", "--streamed"),
        *("--set", "select.order=program", "--set", "select.batches=1"),
    ],
    "depth": ["--recipe", "qwen_image_10b", "--stage", "depth", "--published"],
    "depth, streamed": ["--recipe", "flux_8b", "--stage", "depth", "--streamed"],
    "depth, one of eight": ["--recipe", "flux_8b", "--stage", "depth", "--published", "--devices", "8", "--rank", "4"],
    "width, streamed": ["--recipe", "qwen_image_10b", "--stage", "width", "--streamed", "--published"],
    "answers": ["--recipe", "flux_8b", "--stage", "velocities", "--streamed"],
    "fine-tuning by what fits 24 GB": ["--recipe", "flux_8b", "--stage", "finetune", "--card", "24"],
    "modulation": ["--recipe", "qwen_image_light", "--stage", "modulation"],
    "modulation, streamed": ["--recipe", "flux_light", "--stage", "modulation", "--streamed"],
    "export": ["--recipe", "flux_8b", "--stage", "export"],
}
"""Models with all of their blocks."""
SHALLOW = [
    *(("flux_8b", stage) for stage in ("check", "samples", "probe", "intervals", "select")),
    *(("flux_8b", stage) for stage in ("depth", "velocities", "export")),
    ("flux_8b", "probe", "--streamed"),
]
"""A few blocks of each stack, as wide as they are."""
FEW = "8"
CASES = WHOLE | {
    ", ".join([*case, "few blocks"]): ["--recipe", case[0], "--stage", case[1], *case[2:], "--blocks", FEW]
    for case in SHALLOW
}


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
