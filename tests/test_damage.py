"""Whatever is cut, flipped, emptied or deleted in a finished run or a variant is named or made again, never used."""

import json
import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from runs import job

from ppcl_toolkit import PpclWarning, Recipe, compress, export_target, load_compressed
from ppcl_toolkit.artifacts.files import MANIFEST, RECORD
from ppcl_toolkit.artifacts.pipeline import default_call, load_pipeline
from ppcl_toolkit.artifacts.record import Record
from ppcl_toolkit.artifacts.verify import verify
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.selection.choice import Choice
from ppcl_toolkit.stages.evaluate import load_measurement
from ppcl_toolkit.stages.export import Variant
from ppcl_toolkit.stages.intervals import Candidates
from ppcl_toolkit.stages.modulation import LowRankChoice
from ppcl_toolkit.stages.report import write_report
from ppcl_toolkit.training.checkpoint import load_result

CHANGES = (
    "samples.batch=1",
    "samples.count=4",
    "modulation={rank: 2}",
    "targets=[{name: small, params: 60%, modulation: true}]",
    "depth.steps=3",
    "width={steps: 2, batch: 2, ffn_blocks: 2, text_blocks: 2, batches: 3, text_threshold: 0.3}",
    "evaluate.count=1",
    "evaluate.batch=1",
)
STAGES = ("check", "samples", "modulation", "probe", "intervals", "select", "depth", "width", "low_rank", "evaluate")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a recipe, and the finished run of it."""
    folder = asked(tmp_path_factory.mktemp("world"))
    compress(Recipe.load(folder / "recipe.yaml"), folder / "run")
    return folder


def asked(folder):
    """Write a teacher and a recipe."""
    job(folder, *CHANGES)
    return folder


@pytest.fixture
def run(world, tmp_path):
    """A copy of the finished run, to be damaged."""
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


def again(world, run, **options):
    return compress(Recipe.load(world / "recipe.yaml"), run, **options)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    where = random.Random(path.name).randrange(len(content)) if at is None else at
    content[where] ^= 1 << random.Random(path.name).randrange(8)
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


DAMAGES = (cut, flip, empty, delete)


def kinds(run):
    """One file of every kind that stages and variants hold: by stage, or by place in a variant, and ending."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_file() and len(name.parts) > 1 and name.name != "README.md":
            part = name.parts[2:-1] if name.parts[0] == "variants" else name.parts[1:-1]
            ending = name.name if name.suffix in (".json", ".py") else name.suffix
            found.setdefault((name.parts[0], *part, ending), path)
    return list(found.values())


def contents(run):
    """Every tensor of a run, and what was chosen."""
    paths = [*run.rglob("*.safetensors"), *run.rglob("plan.json"), *run.rglob("losses.json")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def test_a_whole_run_is_found_to_be_one(run):
    found = verify(run)
    names = {finding.name for finding in found}
    assert {*STAGES, "velocities", "finetune/small", "export/small", "variants/small"} == names
    # What has served is deleted, and nothing is expected of it.
    assert {finding.name for finding in found if finding.whole is not True} == {"velocities"}
    assert verify(run / "variants" / "small")[0].whole
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


def test_every_kind_of_file_that_is_damaged_in_any_way_is_named(run):
    chosen = kinds(run)
    assert len(chosen) > 45
    for path in chosen:
        content = path.read_bytes()
        for damage in DAMAGES:
            damage(path)
            wrong = [finding for finding in verify(run) if finding.whole is False]
            assert len(wrong) == 1, (path, damage, wrong)
            # A flipped bit of a list may be in the name of a file, or in what it should be.
            told = f"{wrong[0].name}/{wrong[0].said}"
            assert path.name in told or path.name in (RECORD, MANIFEST), (path, damage, wrong)
            assert path.is_relative_to(run / wrong[0].name)
            path.write_bytes(content)


@pytest.mark.parametrize("stage", [*STAGES, "finetune/small", "export/small"])
def test_a_run_does_not_go_on_with_what_is_damaged(world, run, stage):
    paths = [path for path in sorted((run / stage).rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for path, damage in zip(paths, DAMAGES * len(paths), strict=False):
        damage(path)
        with pytest.raises(PpclError, match=stage) as caught:
            again(world, run)
        assert path.name in str(caught.value) or path.name == RECORD
        path.write_bytes(before[path])
    assert again(world, run)
    after = {path: path.read_bytes() for path in before if path.suffix == ".safetensors"}
    assert after == {path: content for path, content in before.items() if path.suffix == ".safetensors"}


def test_a_damaged_stage_is_made_again_when_asked(world, run):
    wanted = contents(run)
    trained = next(path for stage in ("depth", "width") for path in sorted((run / stage).glob("*.safetensors")))
    for path in (
        run / "samples" / "000002.safetensors",
        run / "probe" / "probes.safetensors",
        trained,
        run / "finetune" / "small" / "losses.json",
    ):
        flip(path)
    again(world, run, remake=True)
    assert contents(run) == wanted
    made = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    remade = [event["stage"] for event in made if event["event"] == "damaged"]
    # What came out as it was before is no reason to make later stages again.
    assert remade == ["samples", "probe", trained.parent.name, "finetune/small"]
    assert all(finding.whole is not False for finding in verify(run))


def test_of_damaged_samples_the_others_stay(world, run):
    paths = sorted((run / "samples").glob("0*.safetensors"))
    delete(paths[0])
    flip(paths[2])
    times = [path.stat().st_mtime_ns for path in paths[1:]]
    again(world, run, remake=True)
    found = [path.stat().st_mtime_ns for path in paths[1:]]
    assert [one == other for one, other in zip(times, found, strict=True)] == [True, False, True]


def test_what_was_made_from_something_else_is_named_and_made_again_when_asked(world, run):
    """As after samples that came out otherwise: on another machine, by another version."""
    record = json.loads((run / "depth" / RECORD).read_text())
    other = {**record, "sha256": None, "before": {**record["before"], "probe": "0" * 64}}
    (run / "depth" / RECORD).write_text(json.dumps(other))
    with pytest.raises(PpclError, match="'depth' in .* was made from another 'probe' than there is now; .* --remake"):
        again(world, run)
    wanted = contents(run)
    again(world, run, remake=True)
    assert contents(run) == wanted
    again(world, run)


def test_an_export_that_is_measured_otherwise_is_the_same(run):
    """Loaded weights lie elsewhere in memory, and what is computed with them may differ in the last bits."""
    record = Record.of(run / "export" / "small")
    other = record.files | {"variant.json": record.files["variant.json"].model_copy(update={"sha256": "0" * 64})}
    assert record.model_copy(update={"files": other}).digest == record.digest
    other |= {MANIFEST: other["variant.json"]}
    assert record.model_copy(update={"files": other}).digest != record.digest


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokenizer_2/tokenizer.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_damaged_variant_does_not_open(world, name, damage, tmp_path):
    shutil.copytree(world / "run" / "variants" / "small", tmp_path / "small")
    damage(tmp_path / "small" / name)
    for opened in (load_compressed, lambda folder: load_pipeline(str(folder))):
        with pytest.raises(PpclError, match=f"small is not as it was exported: {name}"):
            opened(tmp_path / "small")


def test_a_damaged_variant_is_named_by_every_command_and_exported_again(world, run, monkeypatch, capfd):
    from ppcl_toolkit.cli import main

    variant, name = run / "variants" / "small", "tokenizer_2/tokenizer.json"
    delete(variant / name)
    commands = (
        ["generate", variant, "--prompt", "a", "--out", run / "image.png"],
        ["eval", variant, variant, "--prompts", world / "prompts.txt", "--out", run / "eval"],
        ["verify", variant],
        ["verify", run],
    )
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, command)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        assert name in "".join(capfd.readouterr())
    with pytest.raises(PpclError, match=rf"stage 'export/small' in .* is damaged: .*variants/small/{name}"):
        again(world, run)
    again(world, run, remake=True)
    assert load_compressed(variant)
    assert contents(variant) == contents(world / "run" / "variants" / "small")


def test_another_size_is_not_exported_from_a_damaged_bank(run):
    path = next((run / "width").glob("*.safetensors"))
    flip(path)
    with pytest.raises(PpclError, match=f"'width' in .* is damaged: {path.name} has other content"):
        export_target(run, "90%")


def test_without_hashing_names_and_sizes_are_compared_still(world, run):
    paths = sorted((run / "probe").glob("*.safetensors"))
    content = paths[0].read_bytes()
    flip(paths[0])
    again(world, run, verify=False)
    paths[0].write_bytes(content[:-1])
    with pytest.raises(PpclError, match="probes.safetensors has .* bytes instead of"):
        again(world, run, verify=False)


def test_without_hashing_variants_open_and_are_drawn_by_every_command(world, run, monkeypatch, capfd, tmp_path):
    """As those of 40 GB are for which that would take minutes."""
    from ppcl_toolkit.cli import main

    variant = run / "variants" / "small"
    flip(variant / "transformer" / "diffusion_pytorch_model.safetensors", at=-1)
    shutil.rmtree(run / "evaluate")
    again(world, run, verify=False)
    export_target(run, "90%", verify=False)
    commands = (
        ["generate", variant, "--prompt", "a", "--out", tmp_path / "image.png"],
        ["eval", variant, "--prompts", world / "prompts.txt", "--count", "1", "--seeds", "0", "--out", tmp_path],
    )
    for command in commands:
        for option, code in (("--verify", 1), ("--no-verify", 0)):
            monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, command), option])
            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == code, (command, capfd.readouterr())


def test_opening_a_variant_says_nothing(world):
    """Of its own: importing transformers does so without torchvision."""
    script = "import sys; from diffusers import FluxPipeline, AutoModel; from ppcl_toolkit import load_compressed; "
    script += "print('BEGIN', file=sys.stderr); load_compressed(sys.argv[1])"
    command = [sys.executable, "-c", script, world / "run" / "variants" / "small"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stderr.partition("BEGIN")[2].replace("\r", "\n").splitlines()
    assert not [line for line in lines if line.strip() and "it/s]" not in line]
    assert not done.stdout


def test_what_is_too_large_to_be_hashed_at_every_start_is_hashed_when_it_is_read(world, run):
    """Of a run that wants its samples again, for another stage."""
    flip(run / "samples" / "000001.safetensors", at=-1)
    shutil.rmtree(run / "probe")
    with pytest.raises(PpclError, match="samples/000001.safetensors has other content .*; .* with --remake"):
        again(world, run, verify=False)


def test_a_run_and_a_variant_of_an_earlier_version_go_on(world, run):
    """Such records list no files, and such variants have no manifest."""
    for path in run.rglob(RECORD):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({"settings": record["settings"], "after": record["after"]}))
    for folder in ("variants", "export"):
        (run / folder / "small" / MANIFEST).unlink()
    (run / "summary.json").unlink()
    assert all(finding.whole is None for finding in verify(run))
    again(world, run)
    assert (run / "summary.json").exists()
    with pytest.warns(PpclWarning, match="small has no manifest.json, an earlier version made it"):
        load_pipeline(str(run / "variants" / "small"))


def test_a_variant_that_diffusers_has_saved_again_opens(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = load_compressed(run / "variants" / "small")
    script = "import sys; from diffusers import DiffusionPipeline as P; "
    script += "P.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", script, run / "variants" / "small", tmp_path / "saved"], check=True, capture_output=True
    )
    for name in ("plan.json", "block_calls.json"):
        shutil.copy(run / "variants" / "small" / name, tmp_path / "saved")
    with pytest.warns(PpclWarning, match="saved has no manifest.json"):
        saved = load_compressed(tmp_path / "saved")
    ours, theirs = pipeline.transformer.state_dict(), saved.transformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


SHAPES = ("[]", "{}", "3", '"words"', '{"rank": [], "teacher": 1, "a": {"b": 2}}', "[[1, 2], {}]", "{", 900 * "[")


@pytest.fixture
def unproved(run):
    return without_proof(run)


def without_proof(run):
    """Leave a run as earlier versions left theirs: without checksums, everything is read."""
    for path in run.rglob(RECORD):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({"settings": record["settings"], "after": record["after"]}))
    for folder in ("variants", "export"):
        (run / folder / "small" / MANIFEST).unlink()
    return run


def exported(run):
    variant = run / "variants" / "small"
    plan = Plan.load(variant / "plan.json")
    return Variant(name="small", folder=variant, plan=plan, step=plan, dtype="float32", call={}).read(
        run / "export" / "small"
    )


READERS = {
    "select/targets.json": lambda run: Choice.load(run / "select"),
    "select/order.json": lambda run: Choice.load(run / "select"),
    "select/measured.json": write_report,
    "depth/losses.json": write_report,
    "finetune/small/losses.json": write_report,
    "environment.json": write_report,
    "summary.json": write_report,
    "evaluate/teacher/exam.json": write_report,
    "depth/made_from.json": verify,
    "intervals/candidates.json": lambda run: Candidates.load(run / "intervals"),
    "modulation/curve.json": lambda run: LowRankChoice.load(run / "modulation"),
    "finetune/small/transformer.json": lambda run: load_result(run / "finetune" / "small"),
    "export/small/variant.json": exported,
    "evaluate/teacher/measurement.json": lambda run: load_measurement(run / "evaluate" / "teacher"),
    "variants/small/call.json": lambda run: default_call(str(run / "variants" / "small")),
    "variants/small/plan.json": lambda run: load_compressed(run / "variants" / "small"),
    "variants/small/model_index.json": lambda run: load_compressed(run / "variants" / "small"),
    "variants/small/block_calls.json": lambda run: load_compressed(run / "variants" / "small"),
    "variants/small/transformer/config.json": lambda run: load_pipeline(str(run / "variants" / "small")),
}
OUTWARD = {
    "finetune/small/transformer.json": (("files",), "/dev/zero"),
    "depth/made_from.json": (("files", "../../teacher/model_index.json"), {"size": 1, "sha256": "0" * 64}),
    "variants/small/manifest.json": (("files", "/etc/passwd"), {"size": 1, "sha256": "0" * 64}),
}


@pytest.mark.filterwarnings("ignore::ppcl_toolkit.errors.PpclWarning")
@pytest.mark.parametrize("name", OUTWARD)
def test_a_name_in_a_record_does_not_lead_out_of_its_folder(run, name):
    content = json.loads((run / name).read_text())
    (*keys, last), value = OUTWARD[name]
    place = content
    for key in keys:
        place = place[key]
    place[last] = value
    (run / name).write_text(json.dumps({**content, "sha256": None} if name.endswith(RECORD) else content))
    read = {
        "finetune/small/transformer.json": lambda: load_result(run / "finetune" / "small"),
        "depth/made_from.json": lambda: Record.of(run / "depth"),
        "variants/small/manifest.json": lambda: load_compressed(run / "variants" / "small"),
    }
    with pytest.raises(PpclError, match=f"{name} is damaged or of something else: files"):
        read[name]()


def test_a_shard_outside_of_its_folder_is_refused(run):
    variant = run / "variants" / "small"
    (variant / MANIFEST).unlink()
    index = variant / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../../samples/000000.safetensors"}}))
    with pytest.warns(PpclWarning), pytest.raises(PpclError, match="index.json is damaged or of something else"):
        load_compressed(variant)


FITTING = {
    ("select/targets.json", "{}"),
    ("select/order.json", "[]"),
    ("select/measured.json", "[]"),
    ("depth/losses.json", "{}"),
    ("finetune/small/losses.json", "[]"),
    ("variants/small/call.json", "{}"),
    ("variants/small/call.json", SHAPES[4]),
}
"""Content that has the shape of such a record, and says that there is nothing."""


@pytest.mark.filterwarnings("ignore::ppcl_toolkit.errors.PpclWarning")
@pytest.mark.parametrize("name", READERS)
def test_json_of_another_shape_is_one_error_that_names_the_file(unproved, name):
    for shape in SHAPES:
        (unproved / name).write_text(shape)
        said = ""
        try:
            found = READERS[name](unproved)
            said = "".join(one.said for one in found if one.whole is False) if READERS[name] is verify else ""
        except PpclError as error:
            said = str(error)
        assert bool(said) != ((name, shape) in FITTING), shape
        assert len(said) < 900 and "\n" not in said
        # What diffusers reads by itself is named by its folder.
        assert not said or name in said or (name.endswith("config.json") and "variants/small" in said)
