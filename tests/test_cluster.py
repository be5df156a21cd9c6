"""Several processes: one that dies ends the run, and the same command, or the launcher, goes on from there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import CHECKPOINTED, job
from test_end_to_end import contents

from ppcl_toolkit.recipe_files import shipped_text

RUN = """
import os, signal, sys
from pathlib import Path
from nursery import adopt
adopt(early=True)
from ppcl_toolkit import Recipe, compress, processes
from ppcl_toolkit.artifacts import workspace
recipe, out, moment, end, *overrides = sys.argv[1:]
died = Path(out + ".died")
def progress(stage, done, total, note=""):
    if stage.startswith("export/") and done:
        Path(f"{out}.{stage.replace('/', '-')}-by-{os.environ.get('RANK', '0')}").touch()
    if f"{os.environ.get('RANK', '0')} {stage} {done}" == moment and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
whole = workspace.Workspace.job
def job(run, name, *arguments):
    if name.startswith(end):
        processes.part()
        sys.exit()
    return whole(run, name, *arguments)
workspace.Workspace.job = job
workspace.silent = progress  # which every process but the first reports to
compress(Recipe.load(recipe, overrides), out, progress=progress)
"""
SHORT = ("targets=[{name: small, params: 65%}]", "depth.split=segments", "finetune.steps=4")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    job(folder, *CHECKPOINTED)
    (folder / "run.py").write_text(RUN)
    return folder


def run(world, out, moment="never", *, launcher=TORCHRUN, end="export", overrides=SHORT):
    """Run it to stage `end`, or until the process of `moment`, "rank stage step", kills itself the first time."""
    command = [*launcher, str(world / "run.py"), str(world / "recipe.yaml"), str(out), moment, end, *overrides]
    return ended(command)


def ended(command):
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def undisturbed(world):
    done = run(world, world / "undisturbed")
    assert done.returncode == 0, done.stderr[-3000:]
    return contents(world / "undisturbed")


def test_the_launcher_restarts_a_run_that_lost_a_process_and_it_ends_with_the_same_bits(world, undisturbed):
    out = world / "restarted"
    done = run(world, out, "1 depth 8", launcher=(*TORCHRUN, "--max-restarts=1"))
    assert (world / "restarted.died").exists()
    assert done.returncode == 0, done.stderr[-3000:]
    found = contents(out)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []
    assert started(out).count("depth") == 2


@pytest.fixture(scope="module")
def dead(world):
    """A run whose first process has died amid fine-tuning, and how it ended."""
    done = run(world, world / "dead", "0 finetune/small 3")
    done.seconds = time.time() - (world / "dead.died").stat().st_mtime
    shutil.copytree(world / "dead", world / "fewer")
    return done


def test_a_dead_process_ends_the_run_within_a_minute_and_the_same_command_finishes_it(world, undisturbed, dead):
    assert dead.returncode != 0
    assert dead.seconds < 60
    assert (world / "dead" / "width").exists()
    assert not (world / "dead" / "finetune" / "small").exists()
    assert run(world, world / "dead").returncode == 0
    assert contents(world / "dead") == undisturbed
    assert started(world / "dead").count("finetune/small") == 2
    assert started(world / "dead").count("width") == 1


def test_one_process_finishes_what_two_began(world, dead):
    out = world / "fewer"
    assert dead.returncode != 0
    done = run(world, out, launcher=(sys.executable,), end="evaluate")
    assert done.returncode == 0, done.stderr[-3000:]
    assert started(out).count("depth") == 1
    assert (out / "variants" / "small" / "model_index.json").exists()


def test_processes_share_exports_and_make_the_files_that_one_makes(world):
    targets = ("targets=[{name: large, params: 85%, width: false}, {name: small, params: 65%}]", "finetune.steps=1")
    done = run(world, world / "exported", launcher=(sys.executable,), end="evaluate", overrides=targets)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {}
    for name, launcher in (("alone", (sys.executable,)), ("shared", TORCHRUN)):
        out = world / name
        shutil.copytree(world / "exported", out)
        for made in ("export", "variants"):
            shutil.rmtree(out / made)
        (out / "events.jsonl").unlink()
        done = run(world, out, end="evaluate", overrides=targets, launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        assert started(out) == ["export/large", "export/small"]
        made = [path for folder in ("export", "variants") for path in (out / folder).rglob("*") if path.is_file()]
        files[name] = {path.relative_to(out): path.read_bytes() for path in made}
    makers = {path.name.removeprefix("shared.export-") for path in world.glob("shared.export-*")}
    assert makers == {"large-by-0", "small-by-1"}
    assert files["alone"].keys() == files["shared"].keys()
    assert len(files["alone"]) > 10
    assert [name for name, data in files["alone"].items() if files["shared"][name] != data] == []


def started(out):
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line["stage"] for line in lines if line["event"] == "started"]


ALONE = """
import os, signal, sys
from ppcl_toolkit import processes
processes.pick_device("cpu")
processes.watch()
if processes.world()[0] == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
processes.wait()
"""


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_ends_when_another_dies_though_no_launcher_tells_it(world, dying):
    """As on two machines: nobody but the connection between them knows of both."""
    (world / "alone.py").write_text(ALONE)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613", "WORLD_SIZE": "2"}
    both = []
    for rank in range(2):
        own = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(world / "alone.py"), str(dying)]
        both.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in both]
    assert both[dying].returncode == -signal.SIGKILL, said[dying]
    assert both[1 - dying].returncode == 1
    assert "ended" in said[1 - dying].splitlines()[-1]
    assert "the same command goes on" in said[1 - dying].splitlines()[-1]


def test_accelerate_on_cpus_starts_one_process_which_refuses_to_be_several(world, tmp_path):
    asked = [
        "-m",
        "ppcl_toolkit.cli",
        "compress",
        "--recipe",
        str(world / "recipe.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = ended([*ACCELERATE, "--cpu", "--num_processes=2", *asked])
    assert done.returncode != 0
    assert (
        "error: accelerate was asked for 2 processes, and this one is alone: start several with `torchrun"
        in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_accelerate_with_fsdp_but_no_gpu_starts_processes_that_know_each_other(tmp_path):
    says = "sys.stdout.write(f'{processes.is_main()} {processes.world()}\\n')"
    (tmp_path / "who.py").write_text(f"import sys; from ppcl_toolkit import processes; {says}")
    done = ended([*ACCELERATE, "--use_fsdp", "--num_processes=2", "--main_process_port=0", str(tmp_path / "who.py")])
    assert sorted(done.stdout.splitlines()) == ["False (1, 2)", "True (0, 2)"], done.stderr[-2000:]


SRUN = """#!/usr/bin/env bash
# Stands for SLURM: its options are dropped, and the task is started once for each machine of the job.
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames $SLURM_JOB_NODELIST" ]] && printf '127.0.0.1\\nother\\n'
"""


def test_the_slurm_job_runs_on_two_machines(world, tmp_path):
    """Two launchers that find each other: all that the job does but SLURM's own."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(shipped_text("slurm"))
    slurm = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
    }
    own = {"RECIPE": str(world / "recipe.yaml"), "OUT": str(tmp_path / "out"), "PROCESSES": "1", "PORT": "29631"}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    ends = {**os.environ, **slurm, **own, "PATH": path, "HF_HUB_OFFLINE": "1"}
    overrides = [word for override in (*SHORT, "evaluate.count=1") for word in ("--set", override)]
    command = ["bash", str(tmp_path / "job.sh"), *overrides]
    done = subprocess.run(command, env=ends, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["variants"]
    # Two that did not know each other would both have begun every stage, and printed the table.
    assert len(set(started(tmp_path / "out"))) == len(started(tmp_path / "out")) > 5
