"""The command line: a frozen set of commands, one line for every mistake, plain lines where there is no terminal."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from typer.testing import CliRunner

from ppcl_toolkit import cli
from ppcl_toolkit.errors import PpclError

COMMANDS = {
    "adapters": set(),
    "compress": {"--recipe", "--out", "--set"},
    "eval": {"PATHS", "--prompts", "--count", "--seeds", "--batch", "--call", "--out"},
    "export": {"--run", "--target", "--name"},
    "generate": {"PATH", "--prompt", "--seed", "--out", "--call"},
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
        (["export", "--run", "nowhere", "--target", "params=50%"], "no bank"),
        (["export", "--run", "nowhere", "--target", "50%"], "expected params="),
        (["eval", "shapes", "--seeds", "one"], "--seeds"),
        (["eval", "shapes", "--call", "steps"], "expected name=value"),
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
