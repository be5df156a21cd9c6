"""A stage is done once and whole, goes on where it was killed, and refuses what it was not made from."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppcl_toolkit.artifacts import files
from ppcl_toolkit.artifacts.record import Record
from ppcl_toolkit.artifacts.storage import save_tree
from ppcl_toolkit.artifacts.workspace import Workspace
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Probe

RECIPE = "seed: 1\n"


class Stage:
    """Writes one file per unit of work, keeps those that are there, and can be told to fail on the way."""

    def __init__(self, units=3, fails_at=None, error=None, says=None):
        self.units, self.fails_at, self.says = units, fails_at, says
        self.error = error or RuntimeError("killed")
        self.made = []

    def __call__(self, desk):
        for unit in range(self.units):
            path = desk.folder / f"{unit}.txt"
            if not path.exists():
                if unit == self.fails_at:
                    raise self.error
                path.write_text(f"unit {unit}")
                self.made.append(unit)
            desk.progress(unit + 1, self.units)
        return self.says


def read(folder):
    return sorted(path.name for path in folder.glob("*.txt"))


def run_of(folder, **options):
    run = Workspace(folder / "run", **options)
    run.open(RECIPE)
    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.txt")}


def test_a_finished_stage_is_only_read(tmp_path):
    stage = Stage()
    assert run_of(tmp_path).stage("work", {"a": 1}, stage, read) == ["0.txt", "1.txt", "2.txt"]
    assert run_of(tmp_path).stage("work", {"a": 1}, stage, read) == ["0.txt", "1.txt", "2.txt"]
    assert stage.made == [0, 1, 2]
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_killed_stage_finds_its_earlier_files(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run_of(tmp_path).stage("work", {"a": 1}, Stage(fails_at=2), read)
    assert not (tmp_path / "run" / "work").exists()
    again = Stage()
    run_of(tmp_path).stage("work", {"a": 1}, again, read)
    assert again.made == [2]


def test_a_stage_killed_before_it_had_its_name_is_not_made_again(tmp_path):
    run_of(tmp_path).stage("work", {"a": 1}, Stage(), read)
    (tmp_path / "run" / "work").rename(tmp_path / "run" / "work.partial")
    again = Stage()
    run_of(tmp_path).stage("work", {"a": 1}, again, read)
    assert not again.made
    (tmp_path / "run" / "work").rename(tmp_path / "run" / "work.partial")
    (tmp_path / "run" / "work.partial" / "1.txt").unlink()
    run_of(tmp_path).stage("work", {"a": 1}, again, read)
    assert again.made == [1]


@pytest.mark.parametrize("pieces", [False, True])
def test_a_damaged_stage_is_refused_and_made_again_when_asked(tmp_path, pieces):
    """Whole, or what of it is damaged; and what follows it where it comes out otherwise."""
    run = run_of(tmp_path)
    for name in ("one", "two"):
        run.stage(name, {}, Stage(), read, pieces=pieces)
    (tmp_path / "run" / "one" / "1.txt").write_text("unit X")
    with pytest.raises(PpclError, match=r"'one' in .*run is damaged: 1.txt has other content .*; .* --remake"):
        run_of(tmp_path).stage("one", {}, Stage(), read)
    again, first, second = run_of(tmp_path, remake=True), Stage(), Stage()
    again.stage("one", {}, first, read, pieces=pieces)
    again.stage("two", {}, second, read, pieces=pieces)
    assert (first.made, second.made) == ([1] if pieces else [0, 1, 2], [])
    # A stage that is gone comes out otherwise.
    shutil.rmtree(tmp_path / "run" / "one")
    run = run_of(tmp_path)
    run.stage("one", {}, Stage(units=4), read)
    with pytest.raises(PpclError, match=r"'two' in .*run was made from another 'one' than there is now; .* --remake"):
        run.stage("two", {}, Stage(), read)
    again = run_of(tmp_path, remake=True)
    again.stage("one", {}, Stage(units=4), read)
    again.stage("two", {}, second, read)
    assert second.made == [0, 1, 2]


def test_files_that_were_hashed_when_they_were_written_are_not_read_again(tmp_path, monkeypatch):
    hashed = []
    own = files.digest
    monkeypatch.setattr(files, "digest", lambda path: hashed.append(path.name) or own(path))

    def make(desk):
        save_tree(desk.folder / "a.safetensors", {"x": torch.ones(3)})
        save_tree(desk.folder / "b.safetensors", {"x": torch.ones(3)})
        (desk.folder / "b.safetensors").write_bytes(b"written again by something else")
        save_tree(desk.folder / "state.safetensors.tmp", {"x": torch.ones(3)})

    run_of(tmp_path).stage("work", {}, make, lambda folder: sorted(path.name for path in folder.iterdir()))
    assert sorted(hashed) == ["a.safetensors", "b.safetensors", "b.safetensors"]
    found = {path.name for path in (tmp_path / "run" / "work").iterdir()}
    assert found == {"a.safetensors", "b.safetensors", "made_from.json"}
    entries = Record.of(tmp_path / "run" / "work").files
    for name, entry in entries.items():
        content = (tmp_path / "run" / "work" / name).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_files_and_their_names_are_on_the_disk(tmp_path, monkeypatch):
    """What is renamed is synced before, and the folder that has its name after."""
    done = []
    own, rename = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: done.append(str(Path(f"/proc/self/fd/{file}").readlink())) or own(file)
    )
    monkeypatch.setattr(Path, "replace", lambda path, other: done.append(f"{path} -> {other}") or rename(path, other))
    files.write_text(tmp_path / "a.json", "{}")
    partial = tmp_path / ".a.json.partial"
    assert done == [str(partial), f"{partial} -> {tmp_path / 'a.json'}", str(tmp_path)]
    done.clear()
    (tmp_path / "work.partial").mkdir()
    files.put(tmp_path / "work.partial", tmp_path / "work")
    assert done == [f"{tmp_path / 'work.partial'} -> {tmp_path / 'work'}", str(tmp_path)]


def test_what_has_served_is_deleted_and_not_expected(tmp_path):
    run_of(tmp_path).stage("work", {}, Stage(), read)
    run_of(tmp_path).discard("work")
    assert run_of(tmp_path).stage("work", {}, Stage(fails_at=0), read) == []


def test_what_other_settings_left_half_done_is_discarded(tmp_path):
    with pytest.raises(RuntimeError):
        run_of(tmp_path).stage("work", {"a": 1}, Stage(fails_at=2), read)
    again = Stage(units=2)
    assert run_of(tmp_path).stage("work", {"a": 2}, again, read) == ["0.txt", "1.txt"]
    assert again.made == [0, 1]


def test_other_settings_of_a_finished_stage_are_refused_with_the_difference(tmp_path):
    run_of(tmp_path).stage("probe", Probe(batches=3), Stage(), read)
    before = contents(tmp_path)
    with pytest.raises(PpclError) as caught:
        run_of(tmp_path).stage("probe", Probe(batches=4), Stage(units=5), read)
    message = str(caught.value)
    assert "probe.batches was 3, is 4" in message
    assert "probe.batch was" not in message
    assert "Use another --out" in message
    assert "\n" not in message
    assert contents(tmp_path) == before
    assert run_of(tmp_path).stage("probe", Probe(batches=3), Stage(units=5), read)


def test_a_changed_earlier_stage_makes_later_ones_refuse(tmp_path):
    first = run_of(tmp_path)
    first.stage("one", {"a": 1}, Stage(), read)
    first.stage("two", {"b": 1}, Stage(), read)
    for path in (tmp_path / "run" / "one").iterdir():
        path.unlink()
    (tmp_path / "run" / "one").rmdir()
    second = run_of(tmp_path)
    second.stage("one", {"a": 2}, Stage(), read)
    with pytest.raises(PpclError, match="'two' .* was made from an earlier stage that has changed since"):
        second.stage("two", {"b": 1}, Stage(), read)
    assert read(tmp_path / "run" / "two") == ["0.txt", "1.txt", "2.txt"]


def test_stages_may_lie_in_folders(tmp_path):
    run_of(tmp_path).stage("export/70", {}, Stage(), read)
    assert run_of(tmp_path).stage("export/70", {}, Stage(fails_at=0), read) == ["0.txt", "1.txt", "2.txt"]


HOLDER = """
import sys, time
from ppcl_toolkit.artifacts.workspace import Workspace
Workspace(sys.argv[1]).open("seed: 1")
print("open", flush=True)
time.sleep(300)
"""


def test_a_run_belongs_to_one_process_until_that_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(
            PpclError, match=f"^process {holder.pid} on .* is at work in .*run; wait for it, end it, or"
        ):
            run_of(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    run = run_of(tmp_path)
    assert run.stage("work", {}, Stage(), read)
    # This process may go on with what it left, and others may when it is through.
    run_of(tmp_path)
    run.close(RECIPE)
    taken = subprocess.run([sys.executable, "-c", HOLDER.replace("300", "0"), tmp_path / "run"], check=False)
    assert taken.returncode == 0


@pytest.mark.parametrize("content", ["notes.txt", "photos"])
def test_a_foreign_folder_is_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / content).mkdir()
    with pytest.raises(PpclError, match="holds something that is no run of ppcl: no recipe.yaml; choose another --out"):
        Workspace(tmp_path / "run")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(PpclError, match="is a file; --out names a folder"):
        Workspace(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert run_of(tmp_path).stage("work", {}, Stage(), read)


@pytest.mark.parametrize("left", [["environment.json"], [".environment.json.partial"], [".recipe.yaml.partial"]])
def test_a_run_killed_in_its_first_moment_goes_on(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("{")
    assert run_of(tmp_path).stage("work", {}, Stage(), read)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]["torch"]


def test_what_was_asked_first_stays_until_all_is_done(tmp_path):
    run = run_of(tmp_path)
    Workspace(tmp_path / "run").open("seed: 2\n")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == RECIPE
    run.close("seed: 3\n")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_the_stage_goes_on_later(tmp_path, number):
    run_of(tmp_path).stage("one", {}, Stage(), read)
    run = run_of(tmp_path)
    run.stage("one", {}, Stage(), read)
    with pytest.raises(PpclError, match="the disk is full: cannot write .*two.partial; what is finished is kept") as e:
        run.stage("two", {}, Stage(fails_at=1, error=OSError(number, "No space left on device")), read)
    assert "\n" not in str(e.value)
    again, stage = run_of(tmp_path), Stage()
    again.stage("one", {}, Stage(fails_at=0), read)
    again.stage("two", {}, stage, read)
    assert stage.made == [1, 2]


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="strange"):
        run_of(tmp_path).stage("one", {}, Stage(fails_at=1, error=OSError(errno.EIO, "strange")), read)


def test_a_lost_record_is_refused_with_the_folder(tmp_path):
    run_of(tmp_path).stage("work", {}, Stage(), read)
    (tmp_path / "run" / "work" / "made_from.json").unlink()
    with pytest.raises(PpclError, match="'work' in .*run is damaged: .*made_from.json cannot be read: No such file"):
        run_of(tmp_path).stage("work", {}, Stage(), read)


def test_what_killed_exports_left_is_cleared_away(tmp_path):
    run_of(tmp_path)
    for name in ("small.partial/vae", ".abc.partial", "whole"):
        (tmp_path / "run" / "variants" / name).mkdir(parents=True)
    run_of(tmp_path)
    assert [path.name for path in (tmp_path / "run" / "variants").iterdir()] == ["whole"]


def test_warnings_stay_with_the_result(tmp_path):
    run = run_of(tmp_path)
    run.stage("one", {}, Stage(says=["a segment stopped"]), read)
    run.stage("two", {}, Stage(says=[]), read)
    assert run.warnings == ["a segment stopped"]
    again = run_of(tmp_path)
    again.stage("one", {}, Stage(fails_at=0), read)
    assert again.warnings == ["a segment stopped"]


def test_events_tell_what_happened(tmp_path):
    run_of(tmp_path).stage("one", {}, Stage(), read)
    again = run_of(tmp_path)
    again.stage("one", {}, Stage(), read)
    with pytest.raises(RuntimeError):
        again.stage("two", {}, Stage(fails_at=0), read)
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [(line["stage"], line["event"]) for line in lines]
    assert told == [("one", "started"), ("one", "finished"), ("one", "found"), ("two", "started")]
    assert all(line["time"] for line in lines)
    assert lines[1]["seconds"] >= 0


def test_progress_is_reported_by_stage(tmp_path):
    seen = []
    run = run_of(tmp_path, progress=lambda *step: seen.append(step))
    run.stage("one", {}, Stage(units=2), read)
    assert [step[:3] for step in seen] == [("one", 1, 2), ("one", 2, 2)]


def test_stages_of_branches_do_not_depend_on_each_other(tmp_path):
    def made(run, name, value):
        return run.stage(name, {"value": value}, lambda _: None, lambda folder: folder.name)

    for first in (1, 2):
        run = Workspace(tmp_path / "run")
        run.open("seed: 1\n")
        made(run, "root", 0)
        shutil.rmtree(tmp_path / "run/one", ignore_errors=True)
        made(run.branch(), "one", first)
        # Made after another `one`, and the same nevertheless.
        assert made(run.branch(), "two", 0) == "two"
        run.close("seed: 1\n")
