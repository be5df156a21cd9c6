"""The pretended device itself: as strict as a card, and the CPU's values."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import device
import pytest

HERE = Path(__file__).parent
CHECKS = [
    part.name
    for part in ast.parse((HERE / "checks.py").read_text()).body
    if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, list[str]]:
    """What failed of every check, all of them made by one process that has the device."""
    report = tmp_path_factory.mktemp("checks") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / "checks.py"),
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    ends = {**device.environment(2, memory=80_000_000), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for case in xml.parse(report).iter("testcase"):
        wrong = [part.text or "" for part in case if part.tag in ("failure", "error", "skipped")]
        found.setdefault(case.get("name", "").partition("[")[0], []).extend(wrong)
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_device(failures, check):
    assert check in failures
    assert not failures[check], "\n\n".join(failures[check])


def test_processes_have_a_device_each():
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    ends = {**device.environment(2), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(HERE / "processes.py")]
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_without_a_compiler_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert device.missing() == "there is no C++ compiler: 'no-such-compiler' is not found (CXX chooses another)"
    done = subprocess.run([sys.executable, "-c", "print(1)"], env=device.environment(), capture_output=True, text=True)
    assert "no pretended GPU: there is no C++ compiler" in done.stderr
    assert (done.returncode != 0, done.stdout) == (True, "")


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_a_required_device_that_is_missing_is_a_failure(tmp_path, required, outcome):
    ends = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "none", "PPCL_REQUIRE_PRETEND": required}
    test = f"{__file__}::test_without_a_compiler_what_is_missing_is_named"
    command = [sys.executable, "-m", "pytest", test, "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert outcome in done.stdout
    assert "there is no C++ compiler: 'none' is not found" in done.stdout
