"""The whole path on a tiny random pipeline: a killed run ends as an undisturbed one does, bit by bit."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import CHECKPOINTED, job

from ppcl_toolkit.algorithm import compress, export_target
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.selection.choice import Choice
from ppcl_toolkit.stages.samples import load_samples

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
MEASURED = ("latency_ms", "memory_bytes", "seconds")
"""Figures that differ from run to run."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    job(folder, *CHECKPOINTED)
    return folder


@pytest.fixture(scope="module")
def reference(world):
    """An undisturbed run, in this process."""
    return compress(Recipe.load(world / "recipe.yaml"), world / "reference"), world / "reference"


def started(world, out, kill="never", *overrides, launcher=()):
    """Start a run in another process, which kills itself when it reports `stage:step`."""
    script = world / "run.py"
    script.write_text(RUN)
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(world / "recipe.yaml"), str(out), kill, *overrides],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]


def killed(process, reached=None):
    """Wait until a run has killed itself, or kill it and what it started as soon as `reached()`."""
    while reached is not None and process.poll() is None and not reached():
        time.sleep(0.002)
    if reached is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL, output[-3000:]


def contents(out):
    """Every tensor and picture of a run, byte by byte, and what JSON says but for times and paths."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix in (".safetensors", ".png") or path.name in ("losses.json", "targets.json", "plan.json"):
            found[name] = path.read_bytes()
    return found


def figures(summary):
    if isinstance(summary, dict):
        return {key: figures(value) for key, value in summary.items() if key not in (*MEASURED, "path")}
    return [figures(item) for item in summary] if isinstance(summary, list) else summary


def test_the_summary_says_what_was_made(reference):
    summary, out = reference
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary.keys() == {"teacher", "variants", "warnings"}
    assert {"params", "score", "bytes", "latency_ms"} <= summary["teacher"].keys()
    large, small = summary["variants"]
    documented = {"name", "path", "opens", "params", "score", "drop_percent", "rmse", "velocity_error", "latency_ms"}
    for variant in (large, small):
        assert documented <= variant.keys()
        assert Path(variant["path"]).is_dir()
        assert variant["rmse"] > 0
    assert (large["name"], large["opens"]) == ("large", "stock")
    assert (small["name"], small["opens"]) == ("small", "custom")
    total = summary["teacher"]["params"]
    assert large["params"] <= 0.85 * total
    assert small["params"] <= 0.65 * total
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("*.tmp"))
    assert "<html" in (out / "report.html").read_text().lower()


def test_every_variant_opens_and_makes_images(reference):
    summary, _ = reference
    for variant in summary["variants"]:
        pipeline = load_pipeline(variant["path"])
        assert sum(p.numel() for p in pipeline.transformer.parameters()) == variant["params"]
        images = pipeline(["a prompt"], height=8, width=8, num_inference_steps=1, max_sequence_length=8).images
        assert images[0].size == (8, 8)


def test_a_finished_run_is_only_read(world, reference):
    summary, out = reference
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = compress(Recipe.load(world / "recipe.yaml"), out)
    assert figures(json.loads(json.dumps(again))) == figures(json.loads(json.dumps(summary)))
    assert again["teacher"]["latency_ms"] == summary["teacher"]["latency_ms"]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_a_run_killed_many_times_ends_with_the_same_bits(world, reference):
    """Kills amid training come after a state was written, so that it is continued and not begun again."""
    summary, whole = reference
    out = world / "killed"

    for moment in ("samples:2", "depth:8", "width:3", "finetune/large:5", "evaluate:2"):
        if moment.startswith("evaluate"):
            # Amid writing or verifying a variant: from outside, for an export reports only when that is over.
            killed(started(world, out), lambda: any((out / "variants").glob("small*")))
        killed(started(world, out, moment))
    finished(started(world, out))
    one, other = contents(whole), contents(out)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert figures(json.loads((out / "summary.json").read_text())) == figures(json.loads(json.dumps(summary)))
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("*.tmp"))
    stages = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    for stage in ("samples", "depth", "width", "finetune/large", "export/small", "evaluate"):
        assert [line["event"] for line in stages if line["stage"] == stage].count("started") == 2
        assert [line["event"] for line in stages if line["stage"] == stage].count("finished") == 1


def test_a_choice_by_parameters_is_noted_as_it_ever_was(reference):
    """Runs of earlier versions go on: their targets had nothing else."""
    settings = json.loads((reference[1] / "select" / "made_from.json").read_text())["settings"]
    assert settings.keys() == {"targets", "select", "width"}
    assert {*settings["targets"][0]} == {"name", "params", "width"}


def test_another_size_is_exported_from_the_bank(reference):
    summary, out = reference
    total = summary["teacher"]["params"]
    made = export_target(out, "75%")
    assert made["name"] == "75"
    assert summary["variants"][1]["params"] <= made["params"] <= 0.75 * total
    assert sum(p.numel() for p in load_pipeline(made["path"]).transformer.parameters()) == made["params"]
    with pytest.raises(PpclError, match="75 exists already; choose another --name"):
        export_target(out, "75%")


def test_a_size_that_the_bank_cannot_reach_names_the_smallest(reference):
    summary, out = reference
    before = contents(out)
    with pytest.raises(PpclError, match=r"5% is .* parameters, the smallest plan of this bank has ([\d,]+)") as caught:
        export_target(out, "5%")
    nearest = re.search(r"has ([\d,]+)", str(caught.value))[1].replace(",", "")
    assert int(nearest) == summary["variants"][1]["params"]
    assert contents(out) == before


def test_a_bank_is_needed_to_export(tmp_path):
    with pytest.raises(PpclError, match="has no bank: run `ppcl compress --out"):
        export_target(tmp_path, "50%")


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("depth.steps=13", "depth.steps was 12, is 13"),
        ("samples.count=5", "samples.samples.count was 6, is 5"),
        ("finetune.learning_rate=0.5", "learning_rate was 0.0001, is 0.5"),
    ],
)
def test_a_changed_recipe_is_refused_with_the_difference_and_nothing_is_lost(world, reference, override, difference):
    _, out = reference
    before, summary = contents(out), (out / "summary.json").read_text()
    with pytest.raises(PpclError) as caught:
        compress(Recipe.load(world / "recipe.yaml", [override]), out)
    assert difference in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(out) == before
    assert (out / "summary.json").read_text() == summary


def test_an_unreachable_target_names_the_nearest_and_keeps_what_is_done(world):
    out, recipe = world / "unreachable", world / "recipe.yaml"
    with pytest.raises(PpclError, match=r"target 'tiny': 2% is .* the candidates reach ([\d,]+)") as caught:
        compress(Recipe.load(recipe, ["targets=[{name: tiny, params: 2%}]"]), out)
    nearest = re.search(r"reach ([\d,]+)", str(caught.value))[1].replace(",", "")
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert (out / "intervals").is_dir()
    # What can be reached is chosen, from what is there already.
    reachable = Recipe.load(recipe, [f"targets=[{{name: tiny, params: '{nearest}'}}]"])
    with pytest.raises(InterruptedError, match="depth"):
        compress(reachable, out, progress=stop_at_depth)
    assert all(path.stat().st_mtime_ns == made for path, made in done.items())
    assert Choice.load(out / "select").plans["tiny"].operations


def stop_at_depth(stage, *_):
    if stage == "depth":
        raise InterruptedError(stage)


def test_a_width_pruned_variant_is_compressed_again(world, reference):
    """Its plan comes on top of the first one; the folder opens as any other, and remembers both."""
    recipe = Recipe.load(
        world / "recipe.yaml",
        [
            f"teacher.path={reference[1] / 'variants' / 'small'}",
            "targets=[{name: smaller, params: 80%, width: false}]",
            "finetune.steps=2",
            "depth.steps=3",
        ],
    )
    summary = compress(recipe, world / "again")
    (variant,) = summary["variants"]
    assert variant["opens"] == "custom"
    assert variant["params"] <= 0.8 * summary["teacher"]["params"]
    earlier, plan = (
        Plan.load(folder / "plan.json") for folder in (reference[1] / "variants" / "small", Path(variant["path"]))
    )
    assert plan.depths == earlier.depths
    assert len(plan.history) == 2
    assert len(plan.intervals) > len(earlier.intervals)
    transformer = load_pipeline(variant["path"]).transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == variant["params"]


def test_two_processes_make_one_run(world, reference):
    out = world / "together"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    one_target = "targets=[{name: small, params: 80%}]"
    settings = (one_target, "finetune.steps=4", "depth.split=segments")
    finished(started(world, out, "never", *settings, launcher=launcher))
    summary = json.loads((out / "summary.json").read_text())
    assert [variant["name"] for variant in summary["variants"]] == ["small"]
    assert not [*out.rglob("*.partial"), *out.rglob("*.tmp")]
    for one, other in zip(load_samples(out / "samples"), load_samples(reference[1] / "samples"), strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-5)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    told = [(line["stage"], line["event"]) for line in events]
    assert len(set(told)) == len(told) == 2 * len({stage for stage, _ in told})
    losses = json.loads((out / "depth" / "losses.json").read_text())
    assert losses
    assert all([step for step, _ in curve] == list(range(1, 13)) for curve in losses.values())
