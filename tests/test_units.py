"""Whole runs whose targets are in FLOPs and bytes: variants on disk hold what was asked for, by other counters."""

import json
import struct
from pathlib import Path

import pytest
import tiny
import torch
from runs import job
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcl_toolkit import cli
from ppcl_toolkit.algorithm import compress, export_target
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe

CHANGES = (
    "seed=42",
    "intervals={strategy: given, given: [{stack: transformer_blocks, first: 0, last: 1}, "
    "{stack: transformer_blocks, first: 2, last: 4}, {stack: single_transformer_blocks, first: 0, last: 1}]}",
    "modulation={rank: 3, batches: 2, batch: 2, velocity_batches: 1}",
    "depth.steps=2",
    "width={steps: 2, batch: 2, ffn_blocks: 3, batches: 2}",
    "export.dtype=bfloat16",
)
TARGETS = (
    "targets=[{{name: fast, flops: {fast}}}, {{name: fits, bytes: 85%, width: false}}, "
    "{{name: both, params: 55%, flops: 58%, modulation: true}}]"
)
CALL = tiny.flux_inputs(batch=1, image_tokens=16, text_tokens=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.flux_pipeline(5, 3).save_pretrained(folder / "teacher")
    job(folder, *CHANGES, TARGETS.format(fast=6 * counted(folder / "teacher") // 10))
    return folder


@pytest.fixture(scope="module")
def run(world):
    return compress(Recipe.load(world / "recipe.yaml"), world / "run"), world / "run"


def counted(path):
    """FLOPs of a call of a pipeline's transformer."""
    transformer = load_pipeline(path).transformer.float()
    call = dict(CALL, hidden_states=CALL["hidden_states"].float())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(**call)
    return counter.get_total_flops()


def stored(path):
    """Bytes of the tensors in a pipeline's transformer, as the files say."""
    total = 0
    for file in (Path(path) / "transformer").glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name[0] != "_"
        )
    return total


def test_every_variant_meets_its_target(world, run):
    summary, _ = run
    teacher, rows = summary["teacher"], {row["name"]: row for row in summary["variants"]}
    # Of the two dtypes, bytes are those of the export.
    assert teacher["bytes"] == stored(world / "teacher") == 4 * teacher["params"]
    for row in rows.values():
        assert row["bytes"] == stored(row["path"]) == 2 * row["params"]
        assert row["flops"] / teacher["flops"] == pytest.approx(counted(row["path"]) / counted(world / "teacher"))
    assert rows["fast"]["flops"] <= 0.6 * teacher["flops"]
    assert rows["fits"]["bytes"] <= 0.85 * teacher["bytes"] / 2
    assert rows["both"]["flops"] <= 0.58 * teacher["flops"] and rows["both"]["params"] <= 0.55 * teacher["params"]


def test_the_figures_of_the_choice_are_those_of_the_variants(run):
    summary, out = run
    measured = {row["label"]: row["saves"] for row in json.loads((out / "select" / "measured.json").read_text())}
    (fits,) = (row for row in summary["variants"] if row["name"] == "fits")
    saves = [measured[str(operation)] for operation in Plan.load(Path(fits["path"]) / "plan.json").operations]
    assert summary["teacher"]["flops"] - fits["flops"] == sum(each["flops"] for each in saves)
    assert summary["teacher"]["params"] - fits["params"] == sum(each["params"] for each in saves)
    assert sum(each["bytes"] for each in saves) == 2 * sum(each["params"] for each in saves)


def test_other_sizes_are_exported(run, capsys):
    summary, out = run
    teacher = summary["teacher"]
    made = export_target(out, flops="75%")
    assert made["name"] == "flops75" and made["flops"] <= 0.75 * teacher["flops"]
    assert made["flops"] / teacher["flops"] == pytest.approx(counted(made["path"]) / counted(out.parent / "teacher"))
    cli.app(["export", "--run", str(out), "--target", "params=60%, flops=70%"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.startswith("params60-flops70: ") and "FLOPs a step" in said
    with pytest.raises(PpclError, match=r"60% is [\d,]+ parameters, the .*; 5% is [\d,]+ FLOPs, the smallest plan"):
        export_target(out, "60%", flops="5%")
    with pytest.raises(PpclError, match="bytes: target size 'much': expected a share such as 70%"):
        export_target(out, bytes="much")


def test_another_target_is_another_choice(world, run):
    before = {path: path.stat().st_mtime_ns for path in run[1].rglob("*.safetensors")}
    with pytest.raises(PpclError, match=r"stage 'select' .* is finished with other settings: .*select.targets was"):
        compress(Recipe.load(world / "recipe.yaml", ["targets=[{name: fast, flops: 61%, modulation: true}]"]), run[1])
    with pytest.raises(PpclError, match="select.export.dtype was"):
        compress(Recipe.load(world / "recipe.yaml", ["export.dtype=float32"]), run[1])
    assert before == {path: path.stat().st_mtime_ns for path in run[1].rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("flops: 900G", "'900G' is not smaller than the teacher's [0-9,]+ FLOPs"),
        ("bytes: 12GB", "'12GB' is not smaller than the teacher's [0-9,]+ bytes"),
        ("params: 8B", "'8B' is not smaller than the teacher's [0-9,]+ parameters"),
        ("params: 50%, depth: 40%", "depth 40% is below params 50%"),
    ],
)
def test_what_no_teacher_has_is_said_before_the_first_sample(world, tmp_path, size, message):
    recipe = Recipe.load(world / "recipe.yaml", [f"targets=[{{name: it, {size}}}]", "modulation=null"])
    with pytest.raises(PpclError, match=message):
        compress(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("samples*"))


def test_what_is_out_of_reach_in_one_unit_ends_the_choice(world, tmp_path):
    targets = ["targets=[{name: it, params: 90%, flops: 20%, width: false}]", "modulation=null"]
    with pytest.raises(PpclError, match=r"'it': 90% is .* parameters, the candidates reach .*; 20% is .* FLOPs"):
        compress(Recipe.load(world / "recipe.yaml", targets), tmp_path / "run")
