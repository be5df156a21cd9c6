"""The command line: a frozen set of commands, one line for every mistake, plain lines where there is no terminal."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from typer.testing import CliRunner

from ppcl_toolkit import cli, console
from ppcl_toolkit.errors import PpclError

COMMANDS = {
    "adapters": set(),
    "compress": {"--recipe", "--out", "--set"},
    "eval": {"PATHS", "--prompts", "--count", "--seeds", "--batch", "--call", "--out", "--suite", "--scores"},
    "export": {"--run", "--target", "--name"},
    "generate": {"PATH", "--prompt", "--seed", "--out", "--call"},
    "import": {"--from", "--out", "--pipeline"},
    "report": {"--run"},
}


def ppcl(*arguments, **environment):
    """Run the command in a process of its own, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_toolkit.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_commands_and_their_options_are_these():
    for name, options in COMMANDS.items():
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0
        for option in options:
            assert option.lower() in shown.output.lower(), f"{name} has lost {option}"
    shown = CliRunner().invoke(cli.app, ["recipes", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert all(word in shown.output for word in ("list", "show", "schema"))


def test_help_needs_neither_torch_nor_diffusers():
    code = "import sys, ppcl_toolkit.cli; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("names", ["compress, export_target", "export_target, compress"])
def test_public_names_are_the_same_in_any_order(names):
    code = f"from ppcl_toolkit import {names}; print(compress.__name__, callable(compress), callable(export_target))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compress", "True", "True"]


def test_recipes_are_listed_shown_and_described():
    runner = CliRunner()
    assert "tiny" in runner.invoke(cli.app, ["recipes", "list"]).output.split()
    assert "targets:" in runner.invoke(cli.app, ["recipes", "show", "tiny"]).output
    schema = json.loads(runner.invoke(cli.app, ["recipes", "schema"]).output)
    assert "depth" in schema["properties"]
    assert "flux" in runner.invoke(cli.app, ["adapters"]).output


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("teacher: {path: shapes}\ntargets: [{name: a, params: 70%}]\ndepth:\n  stepps: 3\n")
    code, _, err = ppcl("compress", "--recipe", broken)
    assert code == 1
    assert err.strip() == "error: broken.yaml line 4: depth.stepps: unknown key, did you mean 'steps'?"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "--recipe", "nowhere"], "no recipe 'nowhere'"),
        (["compress", "--recipe", "tiny", "--set", "depth.steps"], "expected section.key=value"),
        (["compress", "--recipe", "compare_tiny"], "compare_tiny.yaml is a recipe of `ppcl compare`"),
        (["plan", "--recipe", "compare_tiny"], "compare_tiny.yaml is a recipe of `ppcl compare`"),
        (["compare", "--recipe", "tiny"], "tiny.yaml is a recipe of `ppcl compress`"),
        (["export", "--run", "nowhere", "--target", "params=50%"], "no bank"),
        (["export", "--run", "nowhere", "--target", "50%"], "expected params="),
        (["export", "--run", "nowhere", "--target", "params=-5%"], "params: target size '-5%': expected a share"),
        (["export", "--run", "nowhere", "--target", "params=50%,params=60%"], "expected params="),
        (["export", "--run", "nowhere", "--target", "params=50%,blocks=3"], "expected params="),
        (["export", "--run", "nowhere", "--target", "flops=8GB"], "number such as 40T or 900G"),
        (["eval", "shapes", "--seeds", "one"], "--seeds"),
        (["eval", "shapes", "--call", "steps"], "expected name=value"),
        (["eval", "shapes", "--suite", "hps"], "there are geneval, dpg"),
        (["eval", "shapes", "--suite", "dpg"], "--prompts shapes cannot be read"),
        (["eval", "shapes", "--suite", "dpg", "--seeds", "1,2"], "takes one"),
        (["eval", "nowhere.txt", "--scores"], "nowhere.txt is no file"),
        (["import", "--from", "nowhere", "--out", "variant"], "nowhere is no pipeline folder"),
        (["report", "--run", "nowhere"], "nowhere"),
        (["generate", "nowhere/at/all", "--prompt", "x"], "cannot be opened"),
    ],
)
def test_errors_say_what_was_wrong(arguments, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, PpclError)
    assert says in str(result.exception)


def test_an_unknown_command_has_the_usual_exit_code():
    code, _, err = ppcl("compres")
    assert code == 2
    assert "No such command" in err
    assert "Traceback" not in err


def test_a_plan_says_what_a_recipe_asks_for():
    result = CliRunner().invoke(cli.app, ["plan", "--recipe", "paper_flux"])
    assert result.exit_code == 0, result.output
    for part in ("11,901,408,320", "6,520,810,048", "9 + 24", "GB", "transformer_blocks[3,5]", "disk: samples"):
        assert part in result.output
    slower = CliRunner().invoke(cli.app, ["plan", "--recipe", "tiny_paper", "--json", "--tflops", "0.1"])
    found = json.loads(slower.stdout)
    assert found["teacher"]["params"] == 5_025_760
    trained = [
        "check",
        "samples",
        "probe",
        "intervals",
        "select",
        "depth",
        "width",
        "velocities",
        "finetune",
        "evaluate",
    ]
    assert list(found["hours"]) == trained
    assert all(found["hours"].values())


def test_a_run_prints_lines_a_table_and_paths(tmp_path):
    tiny.flux_pipeline(3, 3).save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "job.yaml").write_text(
        f"""
teacher:
  path: {tmp_path / "teacher"}
  dtype: float32
  call: {{height: 8, width: 8, num_inference_steps: 2, max_sequence_length: 16}}
samples: {{prompts: {tmp_path / "prompts.txt"}, count: 3, batch: 3}}
probe: {{batches: 4}}
intervals: {{batches: 1, batch: 2}}
targets: [{{name: small, params: 85%, width: false}}]
select: {{batches: 1, batch: 2}}
depth: {{steps: 2}}
width: {{steps: 1}}
finetune: {{steps: 2, batch: 2}}
evaluate: {{prompts: {tmp_path / "prompts.txt"}, count: 2, seeds: [0], batch: 2}}
"""
    )
    code, out, err = ppcl("compress", "--recipe", tmp_path / "job.yaml", "--out", tmp_path / "run")
    assert code == 0, err
    assert "\x1b[" not in out + err
    assert any(line.startswith("depth 2/2 100%") for line in err.splitlines())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"{summary['variants'][0]['params']:,}" in out
    assert str(tmp_path / "run" / "variants" / "small") in out
    assert (tmp_path / "run" / "report.html").is_file()
    code, out, err = ppcl(
        "generate", tmp_path / "run" / "variants" / "small", "--prompt", "a", "--out", tmp_path / "a.png"
    )
    assert code == 0, err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_known_is_a_dash_in_the_table(capsys):
    row = {"params": 10, "bytes": 20, "flops": 4e9, "latency_ms": 1.0}
    row |= {"drop_percent": None, "rmse": None, "velocity_error": None}
    teacher = {**row, "score": 0.5, "score_std": 0.0, "chance": None}
    console.print_table({"teacher": teacher, "variants": [{**row, "name": "small", "flops": None, "score": None}]})
    *_, first, second, chance = capsys.readouterr().out.splitlines()
    size, speed = ["10", "100.0%", "20", "B", "4", "GFLOP", "100.0%"], ["1.0", "1.00x"]
    assert first.split() == ["teacher", *size, *speed, "0.500±0.000", "–", "–", "–"]
    assert second.split()[1:9] == ["10", "100.0%", "20", "B", "–", "–", "1.0", "1.00x"]
    assert second.split()[-4:] == ["–"] * 4
    assert chance == "chance: –"


def test_a_benchmark_is_drawn_and_its_scores_become_a_table(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red square", "tag": "colors", "include": []}\n')
    options = ("--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out", "--call", "num_inference_steps=1")
    code, out, err = ppcl("eval", "shapes", "--suite", "geneval", *options)
    assert code == 0, err
    assert f"for the scorer of geneval: {tmp_path / 'out' / 'geneval' / 'shapes'}" in out
    assert (tmp_path / "out" / "geneval" / "shapes" / "00000" / "samples" / "0003.png").is_file()
    for model, score in (("teacher", 88.9), ("student", 86.7)):
        (tmp_path / f"{model}.txt").write_text(f"Model: {model}\nDPG-Bench score: {score}\n")
    code, out, err = ppcl("eval", "--scores", tmp_path / "teacher.txt", f"small={tmp_path / 'student.txt'}")
    assert code == 0, err
    assert [line.split() for line in out.splitlines()[:3]] == [
        ["model", "DPG", "R", "%"],
        ["teacher", "88.9", "(0.00)", "0.00"],
        ["small", "86.7", "(2.47)", "2.47"],
    ]
