"""A command that a signal ends says so in one line and by its exit code, and no child outlives it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ppcl_toolkit.cli import _run_folders
from ppcl_toolkit.ending import unexpected

CHILD = """
import subprocess, sys, time
from ppcl_toolkit import cli

@cli.app.command()
def dawdle():
    print("begun", flush=True)
    subprocess.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(300)"])

sys.argv = ["ppcl", "dawdle"]
cli.main()
"""
LINE = "ended by {}: what is finished is kept, and the same command goes on from here"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def started(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_children_end_with_the_command(number, code):
    process = started("-c", CHILD)
    assert process.stdout.readline() == "begun\n"
    child = int(process.stdout.readline())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.strip() == LINE.format(number.name)
    assert not alive(child)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_run_that_is_ended_keeps_what_it_has(number, code, tmp_path):
    out = tmp_path / "run"
    process = started("-m", "ppcl_toolkit.cli", "compress", "--recipe", "tiny", "--out", out, "--set", "device=cpu")
    limit = time.monotonic() + 600
    while not list(out.glob("samples*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code
    assert said.splitlines()[-1] == LINE.format(number.name)
    assert "Traceback" not in said
    assert list(out.glob("samples*/*.safetensors"))


def test_a_command_that_fits_nowhere_says_so_by_its_exit_code():
    """An exit code that a command asks for is that of the process."""
    script = CHILD.replace('print("begun", flush=True)', "import typer; raise typer.Exit(3)")
    assert started("-c", script).wait(timeout=60) == 3


UNEXPECTED = CHILD.replace('print("begun", flush=True)', "raise LookupError('a strange\\nthing ' + 'x' * 500)")


def ended(tmp_path, *words):
    script = UNEXPECTED.replace('["ppcl", "dawdle"]', repr(["ppcl", *words]))
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    return process.returncode, process.stderr.strip()


def test_what_nobody_expected_is_one_sentence_and_its_traceback_is_kept(tmp_path):
    code, said = ended(tmp_path, "dawdle")
    assert code == 1
    assert said.startswith("error: LookupError: a strange thing xxx") and "\n" not in said and len(said) < 500
    log = tmp_path / "ppcl-error.log"
    assert f"{log} has the traceback" in said
    assert "Traceback" in log.read_text() and "in dawdle" in log.read_text()
    # A second one does not overwrite the first.
    ended(tmp_path, "dawdle")
    assert log.read_text().count("Traceback (most") == 2


@pytest.mark.parametrize("words", [("--debug", "dawdle"), ("dawdle", "--debug")])
def test_the_traceback_is_shown_where_it_is_asked_for(tmp_path, words):
    code, said = ended(tmp_path, *words)
    assert code == 1
    assert "Traceback" in said and "in dawdle" in said
    assert not (tmp_path / "ppcl-error.log").exists()


def test_the_log_is_in_the_run_that_it_belongs_to(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    error = unexpected(ValueError("x"), _run_folders(["compress", "--out", str(run), "--recipe", "tiny"]))
    assert f"{run / 'ppcl-error.log'} has the traceback" in error
    assert _run_folders(["compress", "--out", str(tmp_path)]) == []
    assert "ValueError: x" in (run / "ppcl-error.log").read_text()
