"""Modulation of low rank on the whole path: alone, before blocks go, on top of a narrow variant, below a deeper one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import job

from ppcl_toolkit.algorithm import compress, export_target
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe

CHANGES = (
    "modulation={rank: 3, batches: 12, batch: 4, velocity_batches: 2, guidance: [1.0, 3.5]}",
    "targets=[{name: light, modulation: true}]",
    "finetune.steps=0",
)
RUN = """
import os, signal, sys
from nursery import adopt
adopt(early=True)
from ppcl_toolkit import Recipe, compress
recipe, out, kill, *overrides = sys.argv[1:]
def progress(stage, done, total, note=""):
    if f"{stage}:{done}" == kill:
        os.kill(os.getpid(), signal.SIGKILL)
compress(Recipe.load(recipe, overrides), out, progress=progress)
"""
SIZES = (
    "targets=[{name: light, modulation: true, finetune: false}, {name: large, params: 90%, width: false}, "
    "{name: small, params: 60%, modulation: true, finetune: {steps: 3, learning_rate: 1.0e-3}}]"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    job(folder, *CHANGES)
    (folder / "run.py").write_text(RUN)
    return folder


def recipe(world, *overrides):
    return Recipe.load(world / "recipe.yaml", overrides)


@pytest.fixture(scope="module")
def light(world):
    return compress(recipe(world), world / "light"), world / "light"


@pytest.fixture(scope="module")
def sizes(world):
    return compress(recipe(world, SIZES, "finetune.steps=2"), world / "sizes"), world / "sizes"


def run(world, out, kill="never", *overrides, processes=1):
    """A run in other processes; returns its exit status and what it said."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launcher, world / "run.py", world / "recipe.yaml", out, kill, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def weights(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def loaded_size(path):
    return sum(parameter.numel() for parameter in load_pipeline(path).transformer.parameters())


def test_alone_it_needs_no_training_and_removes_no_block(light):
    summary, out = light
    (variant,) = summary["variants"]
    assert (variant["opens"], variant["name"]) == ("custom", "light")
    # 13 layers of 32 features: 10 of 192 rows, and 3 of 96.
    whole, low = 10 * 192 * 32 + 3 * 96 * 32, 3 * (10 * (192 + 32) + 3 * (96 + 32))
    assert variant["params"] == summary["teacher"]["params"] - whole + low == loaded_size(variant["path"])
    assert variant["velocity_error"] < 0.05
    stages = {path.name for path in out.iterdir() if path.is_dir()}
    assert stages == {"check", "samples", "modulation", "select", "export", "variants", "evaluate"}
    assert not [*out.rglob("*.partial"), *out.rglob("*.tmp")]
    card = (Path(variant["path"]) / "README.md").read_text()
    assert "guidance 1, 3.5; the empty prompt; no negative prompt" in card
    assert "7 recorded calls of the teacher at noise levels from 0 to 1" in card


@pytest.mark.parametrize("moment", ["modulation:5", "modulation:2"])
def test_a_killed_run_ends_with_the_same_bits(world, light, moment):
    out = world / f"killed-{moment[-1]}"
    status, said = run(world, out, moment)
    assert status == -signal.SIGKILL, said
    assert run(world, out)[0] == 0
    assert weights(out) == weights(light[1])


def test_streamed_gives_the_same_bits(world, light):
    compress(recipe(world, "teacher.streamed=true"), world / "streamed")
    assert weights(world / "streamed/variants") == weights(light[1] / "variants")


def test_two_processes_make_the_same(world, light):
    bound = json.loads((light[1] / "modulation/curve.json").read_text())["curve"]["2"] * 1.01
    asked = [
        "modulation.rank=null",
        f"modulation.error={bound}",
        "targets=[{name: low, params: 60%, modulation: true}]",
    ]
    alone = compress(recipe(world, *asked), world / "error")
    out = world / "together"
    status, said = run(world, out, "never", *asked, processes=2)
    assert status == 0, said[-3000:]
    one, other = (json.loads((f / "modulation/curve.json").read_text()) for f in (world / "error", out))
    assert one["rank"] == other["rank"] == 2
    assert one["curve"] == pytest.approx(other["curve"], rel=1e-3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["variants"][0]["params"] == alone["variants"][0]["params"]
    for stage in ("modulation", "low_rank"):
        found = weights(out / stage)
        assert found and found.keys() == weights(world / "error" / stage).keys()
    assert not [*out.rglob("*.partial"), *out.rglob("*.tmp")]


def test_blocks_go_after_it(sizes):
    summary, out = sizes
    light, large, small = summary["variants"]
    assert {path.name for path in (out / "finetune").iterdir()} == {"large", "small"}
    assert light["opens"] == "custom" and light["params"] > small["params"]
    total = summary["teacher"]["params"]
    assert (large["opens"], small["opens"]) == ("stock", "custom")
    assert small["params"] <= 0.6 * total
    plan = Plan.load(Path(small["path"]) / "plan.json")
    assert plan.modulation_swaps and (plan.intervals or plan.ffn_swaps)
    assert loaded_size(small["path"]) == small["params"]
    assert list((out / "low_rank").glob("*.modulation_3.safetensors"))


def test_a_target_is_tuned_as_it_says_itself(sizes):
    _, out = sizes
    curves = {name: json.loads((out / "finetune" / name / "losses.json").read_text()) for name in ("large", "small")}
    assert {name: curve[-1][0] for name, curve in curves.items()} == {"large": 2, "small": 3}


def test_another_size_has_it_too(sizes):
    summary, out = sizes
    made = export_target(out, "80%")
    plan = Plan.load(Path(made["path"]) / "plan.json")
    assert plan.modulation_swaps
    assert summary["variants"][2]["params"] <= made["params"] <= 0.8 * summary["teacher"]["params"]
    assert loaded_size(made["path"]) == made["params"]
    assert "## What its modulation is made for" in (Path(made["path"]) / "README.md").read_text()


def test_a_light_variant_is_a_teacher_of_fewer_blocks(world, light):
    (variant,) = light[0]["variants"]
    given = [f"teacher.path={variant['path']}", "modulation=null", "targets=[{name: small, params: 80%, width: false}]"]
    summary = compress(recipe(world, *given), world / "deeper")
    (small,) = summary["variants"]
    plan = Plan.load(Path(small["path"]) / "plan.json")
    assert plan.intervals and plan.modulation_swaps and len(plan.history) == 2
    assert small["params"] == loaded_size(small["path"]) <= 0.8 * summary["teacher"]["params"]
    with pytest.raises(PpclError, match="or of low rank already"):
        compress(recipe(world, f"teacher.path={variant['path']}"), world / "twice")


def test_a_narrow_variant_becomes_light(world, tmp_path):
    swaps = "width.given=[{kind: ffn_swap, stack: transformer_blocks, block: 1, streams: [image, text]}]"
    targets = "targets=[{name: narrow, params: 97%}]"
    none = "intervals.strategy=given"
    earlier = compress(recipe(world, "modulation=null", targets, none, swaps), tmp_path / "narrow")["variants"][0]
    plan = Plan.load(Path(earlier["path"]) / "plan.json")
    assert plan.ffn_swaps
    (variant,) = compress(recipe(world, f"teacher.path={earlier['path']}"), tmp_path / "light")["variants"]
    both = Plan.load(Path(variant["path"]) / "plan.json")
    assert both.ffn_swaps == plan.ffn_swaps and both.modulation_swaps
    assert variant["params"] == loaded_size(variant["path"]) < 0.8 * earlier["params"]
    assert variant["velocity_error"] < 0.05


def test_training_goes_on_from_it(world, light):
    (untrained,) = light[0]["variants"]
    (variant,) = compress(recipe(world, "finetune.steps=3"), world / "tuned")["variants"]
    assert variant["params"] == untrained["params"]
    one, other = (weights(Path(each["path"]) / "transformer") for each in (untrained, variant))
    assert one.keys() == other.keys() and one != other


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modulation.rank=24", "modulation.rank: 24 saves nothing, layers are 32 wide; from 1 to 23 is possible"),
        ("modulation=null", "a target asks for modulation: give a section modulation"),
        ("modulation.error=0.1", "give rank, or the error that it may cost"),
        ("targets=[{name: a, params: 70%}]", "no target has modulation: true"),
        ("targets=[{name: a}]", "params, bytes, flops are missing: without any a target needs modulation: true"),
    ],
)
def test_bad_input_is_refused_before_anything_is_recorded(world, tmp_path, override, said):
    with pytest.raises(PpclError, match=said):
        compress(recipe(world, override), tmp_path / "run")
    assert not (tmp_path / "run/samples").exists()


def test_the_embedded_teacher_loses_a_quarter(tmp_path):
    cut = ["samples.count=64", "modulation.batches=24", "evaluate.count=7", "evaluate.seeds=[0]", "evaluate.batch=7"]
    summary = compress(Recipe.load("tiny_light", cut), tmp_path / "run")
    (variant,) = summary["variants"]
    # 16 layers of 576 rows and 16 of 288, of 96 features.
    assert summary["teacher"]["params"] == 5_025_760
    assert variant["params"] == 5_025_760 - 16 * (576 + 288) * 96 + 16 * 8 * (576 + 96 + 288 + 96)
    assert variant["velocity_error"] < 0.02
    page = (tmp_path / "run/report.html").read_text()
    assert "rank 8: 0.0" in page and "modulation of low rank" in page
