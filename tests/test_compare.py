"""`ppcl compare` on a tiny random pipeline: every run is made once, killed or not, alone or shared out."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import job
from typer.testing import CliRunner

from ppcl_toolkit.cli import app
from ppcl_toolkit.comparison.asked import Comparison
from ppcl_toolkit.comparison.main import compare
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.rules.method import known_methods

CHANGES = (
    "modulation={rank: 3, batches: 4, batch: 4, velocity_batches: 1, guidance: [1.0, 3.5]}",
    "intervals={batches: 2, batch: 2, strategy: given, given: [{stack: transformer_blocks, first: 0, last: 1}, "
    "{stack: transformer_blocks, first: 2, last: 3}, {stack: single_transformer_blocks, first: 0, last: 1}]}",
    "targets=[{name: light, modulation: true}, {name: small, params: 60%, modulation: true, width: false}]",
    "finetune={steps: 6, batch: 2}",
)
COMPARISON = """
job: {folder}/job.yaml
methods: [default, uniform, velocity]
modulation: {modulation}
targets: [{{name: "70", params: 70%}}]
seeds: [0, 1]
passes: 1400
trials: {{factors: [0.5, 2.0], seed: 7, batches: 1}}
tolerance: 0.08
scoring: {{batches: 2, batch: 2}}
"""
RUN = """
import os, signal, sys
from nursery import adopt
adopt(early=True)
from ppcl_toolkit.comparison.asked import Comparison
from ppcl_toolkit.comparison.main import compare
recipe, out, kill, *given = sys.argv[1:]
def progress(stage, done, total, note=""):
    if f"{stage}:{done}" == kill:
        os.kill(os.getpid(), signal.SIGKILL)
compare(Comparison.load(recipe, given), out, progress=progress)
"""
PART = ("methods=[default, velocity]", "modulation=without")
"""Enough to be killed and shared out: the runs of a method are what they are, whatever others there are."""
TIMES = ("latency_ms",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    job(folder, *CHANGES, name="job.yaml")
    (folder / "both.yaml").write_text(COMPARISON.format(folder=folder, modulation="both"))
    (folder / "run.py").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def whole(world):
    return compare(Comparison.load(world / "both.yaml"), world / "whole"), world / "whole"


def run(world, out, kill="never", *overrides, processes=1):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launcher, world / "run.py", world / "both.yaml", out, kill, *PART, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def figures(value):
    if isinstance(value, dict):
        return {key: figures(item) for key, item in value.items() if key not in TIMES}
    return [figures(item) for item in value] if isinstance(value, list) else value


def part(summary):
    """The runs that `PART` asks for."""
    return [made for made in summary["runs"] if made["method"] in ("default", "velocity") and not made["modulation"]]


def test_every_run_is_there_with_its_size_and_what_it_spent(whole):
    summary, out = whole
    assert len(summary["runs"]) == 3 * 2 * 2 and len(summary["rows"]) == 3 * 2
    total = summary["teacher"]["params"]
    for made in summary["runs"]:
        assert "failed" not in made, made
        assert made["off"] == 0 and abs(made["params"] / total / 0.7 - 1) <= 0.08
        assert 0.5 * 1400 < sum(made["passes"].values()) <= 1400
        assert made["steps"]["finetune"] >= 1
        assert (made["passes"]["modulation"] > 0) == made["modulation"]
        assert any("modulation" in operation for operation in made["plan"]) == made["modulation"]
    searched = {made["method"]: made["passes"]["search"] for made in summary["runs"]}
    # 8 blocks, 4 samples: the teacher, and behind each block those that come after it.
    assert searched["uniform"] == 0 and searched["velocity"] == 4 * (8 + 28)
    assert json.loads((out / "comparison.json").read_text()) == summary


def test_the_table_says_all_of_it(whole):
    summary, out = whole
    text = (out / "comparison.md").read_text()
    page = (out / "comparison.html").read_text()
    # A line for each row, and another for the trials of each.
    assert len(text.splitlines()) == 2 * (2 + len(summary["rows"])) + 1
    assert page.count("<tr>") == 2 * (1 + len(summary["rows"])) and page.count("<svg") == 2
    # No scorer here: the velocity error decides.
    assert summary["figure"] == "velocity_error"
    tested = [row for row in summary["rows"] if row["method"] != "default"]
    # A row is tested, or says why it is not.
    for row in tested:
        assert ("not tested" in row["note"]) == (row["p"] is None) == (row["error"] is None)
    assert any(0 <= row["p"] <= 1 for row in tested if row["p"] is not None)


def test_every_method_learns_at_the_best_of_the_rates_that_it_tried(whole):
    summary, out = whole
    tried = {}
    for trial in summary["trials"]:
        assert trial["seed"] == 7 and "score" not in trial and "failed" not in trial
        tried.setdefault((trial["method"], trial["modulation"]), {})[trial["factor"]] = trial["velocity_error"]
    assert len(tried) == 6 and all(set(own) == {0.5, 2.0} for own in tried.values())
    for made in summary["runs"]:
        errors = tried[made["method"], made["modulation"]]
        assert made["factor"] == min(errors, key=errors.get)
        record = f"runs/1400/70/{'modulation' if made['modulation'] else 'plain'}/{made['method']}/{made['seed']}"
        rate = json.loads((out / record / "finetune/made_from.json").read_text())["settings"]["learning_rate"]
        assert rate == pytest.approx(1e-4 * made["factor"])
    # No picture is drawn for a trial, and what did not win is in the table.
    assert not list((out / "trials").rglob("*.png"))
    lines = (out / "comparison.md").read_text().splitlines()
    assert sum("×0.5 " in line and "; ×2 " in line for line in lines) == 6


def test_of_two_budgets_each_has_its_rows(world, tmp_path):
    given = ["passes=[800, 1400]", "seeds=[0]", "modulation=without", "methods=[default, uniform]", "trials=null"]
    summary = compare(Comparison.load(world / "both.yaml", given), tmp_path / "run")
    rows = {(row["budget"], row["method"]): row for row in summary["rows"]}
    assert [*rows] == [(800, "default"), (800, "uniform"), (1400, "default"), (1400, "uniform")]
    for method in ("default", "uniform"):
        few, more = rows[800, method], rows[1400, method]
        assert few["spent"] <= 800 < more["spent"] <= 1400 and few["factors"] == [1.0]
    assert rows[800, "uniform"]["velocity_error"] != rows[1400, "uniform"]["velocity_error"]
    page = (tmp_path / "run/comparison.html").read_text()
    assert "uniform, 0.8k" in page and "uniform, 1.4k" in page and "800 or 1,400 block passes" in page


def test_what_diverges_is_made_once_more_with_a_third_of_its_rate(world, tmp_path):
    """At such a rate the first steps end in what is no number."""
    given = ["seeds=[0]", "modulation=without", "methods=[velocity]", "reference=velocity", "trials=null"]
    wild = "settings={finetune.learning_rate: 1.0e30, finetune.clip: null}"
    summary = compare(Comparison.load(world / "both.yaml", [*given, wild]), tmp_path / "run")
    (made,) = summary["runs"]
    assert made["factor"] == pytest.approx(1 / 3) and "broke off after 1 of" in made["failed"]
    assert "seed 0 broke off at ×1, and is of a third of it" in summary["rows"][0]["note"]
    runs = tmp_path / "run/runs/1400/70/plain/velocity/0"
    rates = [
        json.loads((folder / "finetune/made_from.json").read_text())["settings"]["learning_rate"]
        for folder in (runs, runs / "again")
    ]
    assert rates[1] == pytest.approx(rates[0] / 3)
    # A student that diverged is not measured.
    assert not list(runs.rglob("evaluate"))


def test_a_seed_changes_the_training_and_nothing_else(whole):
    summary, _ = whole
    by = {(m["method"], m["modulation"], m["seed"]): m for m in summary["runs"]}
    one, other = by["velocity", False, 0], by["velocity", False, 1]
    assert one["plan"] == other["plan"] and one["steps"] == other["steps"]
    assert one["velocity_error"] != other["velocity_error"]


def test_a_killed_comparison_ends_with_the_same_figures(world, whole):
    out = world / "killed"
    often = "settings={finetune.checkpoint_every: 2}"
    status, said = run(world, out, "runs/1400/70/plain/velocity/0/finetune:3", often)
    assert status == -signal.SIGKILL, said[-2000:]
    made = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert made
    status, said = run(world, out, "never", often)
    assert status == 0, said[-3000:]
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    # What is there of the whole serves a comparison of a part.
    shutil.copytree(whole[1], world / "part")
    expected = compare(Comparison.load(world / "both.yaml", PART), world / "part")
    assert figures(json.loads((out / "comparison.json").read_text())) == figures(expected)
    assert figures(expected["runs"]) == figures(part(whole[0]))


def test_two_processes_share_out_the_runs(world, whole):
    out = world / "together"
    status, said = run(world, out, processes=2)
    assert status == 0, said[-3000:]
    one, other = part(whole[0]), json.loads((out / "comparison.json").read_text())["runs"]
    assert [(m["method"], m["plan"], m["passes"]) for m in one] == [
        (m["method"], m["plan"], m["passes"]) for m in other
    ]
    assert [m["velocity_error"] for m in other] == pytest.approx([m["velocity_error"] for m in one], rel=0.02)
    assert {path.name for path in (out / "answers").iterdir()} == {"0", "1"}


def test_methods_may_be_added_later(world, whole):
    summary, out = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    more = Comparison.load(world / "both.yaml", ["methods=[default, velocity, random_1]", "modulation=without"])
    again = compare(more, out)
    assert {row["method"] for row in again["rows"]} == {"default", "velocity", "random_1"}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("methods=[default, unifrom]", "no method 'unifrom'; did you mean 'uniform'"),
        ("methods=[velocity]", "reference: 'default' is none of the methods"),
        ("targets=[{name: a, params: 70%, flops: 70%}]", "give params or flops"),
        ("settings={modulation: null, 'targets': [{name: a, params: 50%}]}", "has no section modulation"),
        ("seeds=[1, 1]", "stands there twice"),
        ("passes=[100, 100]", "stands there twice"),
        ("trials.seed=1", "trials.seed 1 is one of the seeds"),
        ("trials.factors=[1.0]", "trials.factors"),
        ("settings={select.method: uniform}", "name it among the methods instead"),
        ("sedes=[1]", "unknown key, did you mean 'seeds'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(world, tmp_path, override, said):
    with pytest.raises(PpclError, match=said):
        compare(Comparison.load(world / "both.yaml", [override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_that_the_search_uses_up_is_said_in_the_row(world, tmp_path):
    few = Comparison.load(world / "both.yaml", ["passes=300", "modulation=without", "seeds=[0]", "trials=null"])
    rows = {row["method"]: row for row in compare(few, tmp_path / "run")["rows"]}
    assert "300 block passes are too few for default" in rows["default"]["note"]
    assert rows["uniform"]["seeds"] == 1 and rows["default"]["seeds"] == 0


def test_a_size_that_no_blocks_have_is_marked_and_not_tested(world, tmp_path):
    given = ["tolerance=0.0001", "modulation=without", "seeds=[0]", "methods=[default, uniform]", "trials=null"]
    exact = Comparison.load(world / "both.yaml", [*given, "targets=[{name: a, params: 75%}]"])
    rows = {row["method"]: row for row in compare(exact, tmp_path / "run")["rows"]}
    assert all("off the target: " in row["note"] for row in rows.values())
    assert ("not tested" in rows["uniform"]["note"]) == (rows["uniform"]["size"] != rows["default"]["size"])
    assert "not tested" in rows["uniform"]["note"] and rows["uniform"]["difference"] is None


NARROW = ("table2_wp_text", "table2_wp_ffn", "paper")


def few(world, out, methods, *overrides):
    given = [f"methods=[{', '.join(methods)}]", "seeds=[0]", "passes=1200", "tolerance=0.15", "trials=null", *overrides]
    summary = compare(Comparison.load(world / "both.yaml", given), out)
    return {made["method"]: made for made in summary["runs"]}


def test_every_method_goes_its_whole_way(world, tmp_path):
    files = {name: own for name, own in known_methods().items() if name not in ("random", "uniform", "paper")}
    names = [method.name for own in files.values() for method in own if method.name not in NARROW]
    by = few(world, tmp_path / "run", names, "modulation=with", "targets=[{name: a, params: 60%}]")
    assert [name for name, made in by.items() if "failed" in made] == ["dense2moe"]
    assert "mixture of experts" in by.pop("dense2moe")["failed"]
    assert all(made["velocity_error"] > 0 and made["rmse"] >= 0 for made in by.values())
    stages = {name: set(made["steps"]) for name, made in by.items()}
    for row in ("baseline", "lp_a", "lp", "lp_b", "dp"):
        assert stages[f"table2_{row}"] == {"depth"}
    assert stages["velocity"] == stages["tinyfusion"] == {"finetune"}
    assert stages["amber_image"] == stages["default"] == {"depth", "finetune"}
    assert "dense2moe" in (tmp_path / "run/comparison.md").read_text()


def test_rows_with_narrow_blocks_learn_them(world, tmp_path):
    given = ["settings={width.text_threshold: 0.0, width.text_blocks: 4, width.ffn_blocks: 5}", "reference=paper"]
    by = few(world, tmp_path / "run", NARROW, *given, "modulation=without", "targets=[{name: a, params: 55%}]")
    assert not [made["failed"] for made in by.values() if "failed" in made]
    assert all("width" in made["steps"] for made in by.values())
    assert "finetune" in by["paper"]["steps"] and "finetune" not in by["table2_wp_ffn"]["steps"]
    assert any(" text [" in operation for operation in by["table2_wp_text"]["plan"])
    assert not any(" ffn " in operation for operation in by["table2_wp_text"]["plan"])


def test_the_default_may_choose_by_a_program_and_is_charged_for_it(world, tmp_path):
    """Among wider candidates than the others have; what it takes together is a search, too."""
    given = ["modulation=without", "tolerance=0.05", "passes=2000"]
    searched = {}
    for order in ("price", "program"):
        wide = "intervals.strategy: trend, width.ffn_blocks: 8, width.steps: 0"
        wide += ", targets: [{name: small, params: 60%, modulation: true}]"
        made = few(world, tmp_path / order, ["default"], f"settings={{select.order: {order}, {wide}}}", *given)[
            "default"
        ]
        assert made["off"] == 0 and made["velocity_error"] > 0
        searched[order] = made["passes"]["search"]
    # FFNs begin and stay, but for fine-tuning, as their closed form has them.
    assert any(" ffn " in operation for operation in made["plan"]) and made["steps"]["width"] == 0
    errors = json.loads((tmp_path / "program" / "errors" / "errors.json").read_text())
    assert {"transformer_blocks[1,2]", "transformer_blocks[0,3]", "transformer_blocks[1] ffn image"} <= errors.keys()
    # Two samples through eight blocks for each candidate and for the teacher, twice; as many for what goes together.
    once = searched["program"] - searched["price"] - 16 * (len(errors) - len(_priced(tmp_path)))
    assert once > 0 and once % 16 == 0


def _priced(folder):
    return json.loads((folder / "price" / "errors" / "errors.json").read_text())


def test_the_command_prints_the_table(world, whole):
    _, out = whole
    words = ["compare", "--recipe", str(world / "both.yaml"), "--out", str(out), "--set", "methods=[default]"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "default" in done.output and "comparison.html" in done.output
