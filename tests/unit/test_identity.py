"""Which teacher a run was made from: its commit on the hub, or all of its files, hashed once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ppcl_toolkit import Recipe, compress, export_target
from ppcl_toolkit.artifacts import identity as module
from ppcl_toolkit.artifacts.files import RECORD
from ppcl_toolkit.artifacts.identity import NOTES, early_identity, identity
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.errors import PpclError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
COMMITS = ("a" * 40, "b" * 40)
RECIPE = """
seed: 1
device: cpu
teacher: {{path: {path}, dtype: float32, call: {{height: 8, width: 8, num_inference_steps: 1, max_sequence_length: 8}}}}
samples: {{prompts: {folder}/prompts.txt, count: 2}}
probe: {{batches: 1, batch: 2}}
intervals: {{batches: 1, batch: 2}}
targets: [{{name: small, params: 85%, width: false}}]
select: {{batches: 1, batch: 2}}
depth: {{steps: 1, batch: 2}}
width: {{steps: 0, ffn_blocks: 0}}
finetune: {{steps: 0}}
export: {{dtype: float32}}
evaluate: {{prompts: {folder}/prompts.txt, count: 1, seeds: [0], velocity_batches: 1}}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity") / "flux"
    tiny.flux_pipeline(4, 1).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "flux")


def recipe(folder, path, **changes):
    (folder / "prompts.txt").write_text("one prompt\nanother prompt\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, path=path))
    return Recipe.load(folder / "recipe.yaml", [f"{key}={value}" for key, value in changes.items()])


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_bit_of_any_file_that_is_loaded_makes_another_teacher(teacher):
    first = identity(str(teacher), str(teacher))
    for path in sorted(path for path in teacher.rglob("*") if path.is_file()):
        flip(path, at=path.stat().st_size // 2)
        assert identity(str(teacher), str(teacher)) != first, path
        flip(path, at=path.stat().st_size // 2)
    (teacher / "README.md").write_text("A model card is no part of a model.")
    (teacher / "transformer" / "more.json").write_text("{}")
    assert identity(str(teacher), str(teacher)) != first
    (teacher / "transformer" / "more.json").unlink()
    assert identity(str(teacher), str(teacher)) == first


def test_the_digest_is_that_of_names_and_contents(teacher):
    files = [path for path in teacher.rglob("*") if path.is_file()]
    wanted = {path.relative_to(teacher).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    digest = hashlib.sha256(json.dumps(dict(sorted(wanted.items()))).encode()).hexdigest()
    assert identity(str(teacher), str(teacher)) == f"{teacher}#{digest}"


def test_files_are_hashed_once(teacher, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(module, "digest", lambda path, own=module.digest: (read.append(path.name), own(path))[1])
    notes = tmp_path / NOTES
    first = identity(str(teacher), str(teacher), notes)
    count = len(read)
    assert count == len([path for path in teacher.rglob("*") if path.is_file()])
    assert identity(str(teacher), str(teacher), notes) == first and len(read) == count
    os.utime(teacher / WEIGHTS)
    assert identity(str(teacher), str(teacher), notes) == first and read[count:] == [
        "diffusion_pytorch_model.safetensors"
    ]
    # Notes that are damaged are not believed.
    content = json.loads(notes.read_text())
    name = str(teacher / WEIGHTS)
    content["files"][name][2] = "0" * 64
    for text in (json.dumps(content), "[]", "{", ""):
        notes.write_text(text)
        assert identity(str(teacher), str(teacher), notes) == first


def test_a_file_that_cannot_be_read_is_named(teacher, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "digest", refuse)
    with pytest.raises(PpclError, match="model_index.json cannot be read: Permission denied"):
        identity(str(teacher), str(teacher))


def test_a_run_is_not_resumed_with_another_teacher(teacher, tmp_path):
    job = recipe(tmp_path, teacher)
    compress(job, tmp_path / "run")
    # Behind the first mebibyte, or where earlier versions did not look at all.
    flip(next((teacher / "text_encoder_2").glob("*.safetensors")))
    for again in (lambda: compress(job, tmp_path / "run"), lambda: export_target(tmp_path / "run", "90%")):
        with pytest.raises(PpclError, match=r"from the teacher .*flux#\w{64}"):
            again()


def renamed(run, source):
    """Let a run be one of an earlier version, whose records list no files."""
    for path in run.rglob(RECORD):
        record = json.loads(path.read_text())
        settings = record["settings"] | ({"source": source} if "source" in record["settings"] else {})
        path.write_text(json.dumps({"settings": settings, "after": record["after"]}))


def test_a_run_of_an_earlier_version_goes_on_with_the_same_teacher_alone(teacher, tmp_path):
    job = recipe(tmp_path, teacher)
    compress(job, tmp_path / "run")
    for name in ("probe", "intervals", "select", "depth", "width", "velocities", "finetune", "export", "evaluate"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    shutil.rmtree(tmp_path / "run" / "variants")
    renamed(tmp_path / "run", early_identity(str(teacher), str(teacher), None))
    summary = compress(job, tmp_path / "run")
    assert any("begun by an earlier version, which noted neither" in said for said in summary["warnings"])
    assert export_target(tmp_path / "run", "90%")["opens"] == "stock"
    flip(teacher / WEIGHTS, at=min((teacher / WEIGHTS).stat().st_size, 1 << 20) - 1)
    with pytest.raises(PpclError, match="was made from the teacher .*, and that is"):
        compress(job, tmp_path / "run")


@pytest.fixture
def hub(saved, tmp_path):
    """A cache of the hub as its client leaves it: two commits, the second is that of the branch `main`."""
    place = tmp_path / "hub" / "models--tiny--flux"
    for commit in COMMITS:
        shutil.copytree(saved, place / "snapshots" / commit)
    flip(place / "snapshots" / COMMITS[1] / WEIGHTS)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMITS[1])
    return tmp_path / "hub"


def test_a_hub_id_is_recorded_with_its_commit(hub, tmp_path):
    """In a fresh process: the hub's client reads where its cache is when it is imported."""
    script = """
import sys
from nursery import adopt
adopt(early=True)
from ppcl_toolkit import Recipe, compress
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.artifacts.identity import source_of
recipe, folder, main, other = sys.argv[1:]
for out, changes, commit in (("a", [], main), ("b", [f"teacher.revision={other}"], other)):
    summary = compress(Recipe.load(recipe, changes), f"{folder}/{out}")
    from pathlib import Path
    assert source_of(Path(folder, out)) == f"tiny/flux@{commit}", source_of(Path(folder, out))
    assert summary["teacher"]["memory_bytes"], summary["teacher"]
refs = Path(sys.argv[2], "hub", "models--tiny--flux", "refs", "main")
compress(Recipe.load(recipe), f"{folder}/a")
refs.write_text(other)
try:
    compress(Recipe.load(recipe), f"{folder}/a")
except PpclError as error:
    print(error)
"""
    recipe(tmp_path, "tiny/flux")
    beside = str(Path(tiny.__file__).parent)
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": beside}
    words = [sys.executable, "-c", script, tmp_path / "recipe.yaml", tmp_path, COMMITS[1], COMMITS[0]]
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"from the teacher tiny/flux@{COMMITS[1]}, and that is tiny/flux@{COMMITS[0]} now" in done.stdout


def test_a_hub_id_that_nobody_has_is_one_error():
    with pytest.raises(PpclError, match="nobody/nothing cannot be opened as a pipeline: .* give a local folder"):
        load_pipeline("nobody/nothing")


class Stop(Exception):
    """As if the power had failed."""


def until_samples(stage, *_, **__):
    if stage == "samples":
        raise Stop


OWN = """
from dataclasses import replace
from ppcl_toolkit.adapter import load_adapter
FLUX = load_adapter("flux")
DUAL, SINGLE = FLUX.stacks

def counted(call):
    return call["hidden_states"].shape[1]

ADAPTER = replace(FLUX, family="own", noised=counted)
"""
OTHERS = {
    "DUAL = replace(DUAL, ffn={})\nADAPTER = replace(ADAPTER, stacks=(DUAL, SINGLE))": "adapter.stacks",
    "ADAPTER = replace(ADAPTER, negatives_last=True)": "adapter.negatives_last was null, is true",
    "def counted(call):\n    return 4\nADAPTER = replace(ADAPTER, noised=counted)": "adapter.noised was",
    "# Only a comment, and what `ppcl plan` reads.\nADAPTER = replace(ADAPTER, models={}, others=(1,))": None,
}


def test_a_run_does_not_go_on_with_a_changed_adapter(teacher, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def begun(text):
        (tmp_path / "counted_adapter.py").write_text(text)
        monkeypatch.delitem(sys.modules, "counted_adapter", raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        with pytest.raises(Stop):
            compress(
                recipe(tmp_path, teacher, adapter="counted_adapter:ADAPTER"), tmp_path / "run", progress=until_samples
            )

    begun(OWN)
    assert (tmp_path / "run" / "check" / RECORD).exists()
    for change, told in OTHERS.items():
        if told is None:
            begun(OWN + change)
            continue
        with pytest.raises(PpclError, match="was made with another adapter 'own': .*; use another --out") as caught:
            begun(OWN + change)
        assert told in str(caught.value)
    # A run of an earlier version, which did not note its adapter.
    record = json.loads((tmp_path / "run" / "check" / RECORD).read_text())
    del record["settings"]["adapter"]
    (tmp_path / "run" / "check" / RECORD).write_text(json.dumps({**record, "sha256": None}))
    begun(OWN)
