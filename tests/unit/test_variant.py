"""Variants on disk: what is saved is what is opened, in this process and in fresh ones, and broken folders say so."""

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers import AutoModel, DiffusionPipeline
from pydantic import ValidationError

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts import variant
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.artifacts.variant import load_compressed, save_variant, verify_variant
from ppcl_toolkit.budget.model import Model
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.surgery.assemble import reshape

STACK = "transformer_blocks"
DEPTH = (Interval(stack=STACK, first=0, last=1), Interval(stack="single_transformer_blocks", first=1, last=2))
WIDTH = (
    *DEPTH,
    TextRun(stack=STACK, reference=2, last=4),
    FfnSwap(stack=STACK, block=2, streams=("image", "text")),
    FfnSwap(stack=STACK, block=4, streams=("image",)),
)


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


class Saved:
    """A student of a tiny pipeline and the folder it was written to."""

    def __init__(self, folder, operations, dtype=torch.float32):
        self.folder = folder
        self.pipeline = tiny.flux_pipeline(6, 3)
        self.kwargs = tiny.flux_inputs()
        transformer, adapter = self.pipeline.transformer, load_adapter("flux")
        self.plan = Plan(family="flux", depths=adapter.depths(transformer), operations=operations)
        self.student = copy.deepcopy(transformer)
        reshape(self.student, adapter, self.plan, self.kwargs)
        tiny.randomize(self.student, seed=3).to(dtype)
        self.kwargs = {name: cast(value, dtype) for name, value in self.kwargs.items()}
        self.opens = save_variant(self.pipeline, self.student, self.plan, self.kwargs, folder)

    @torch.no_grad()
    def output(self):
        return self.student(**self.kwargs)[0]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("stock") / "variant", DEPTH)


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("custom") / "variant", WIDTH)


@pytest.fixture
def broken(custom, tmp_path):
    """A copy of the custom variant, to be damaged: without a manifest, as a stranger may give one."""
    shutil.copytree(custom.folder, tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").unlink()
    return tmp_path / "broken"


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Keep the copies that diffusers makes of modelling files out of the user's cache."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])


def assert_same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name])


def test_depth_only_variant_is_stock(stock):
    assert stock.opens == "stock"
    assert not list(stock.folder.rglob("*.py"))
    opened = DiffusionPipeline.from_pretrained(stock.folder)
    assert type(opened.transformer) is diffusers.FluxTransformer2DModel
    assert_same_weights(opened.transformer, stock.student)
    assert_same_weights(opened.vae, stock.pipeline.vae)
    assert_same_weights(load_compressed(stock.folder).transformer, stock.student)


def test_width_pruned_variant_never_carries_the_stock_name(custom):
    assert custom.opens == "custom"
    names = [json.loads((custom.folder / "model_index.json").read_text())["transformer"][1]]
    names.append(json.loads((custom.folder / "transformer" / "config.json").read_text())["_class_name"])
    assert names == ["NarrowFluxTransformer2DModel"] * 2
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(custom.folder)


def test_load_compressed_runs_no_code_from_the_folder(broken, custom):
    for file in broken.rglob("*.py"):
        file.write_text("raise RuntimeError('this must not run')\n")
    opened = load_compressed(broken)
    assert_same_weights(opened.transformer, custom.student)
    with torch.no_grad():
        assert torch.allclose(opened.transformer(**custom.kwargs)[0], custom.output(), atol=1e-6)
    with pytest.raises(PpclError, match="save_variant"):
        opened.save_pretrained(broken.parent / "again")


def test_loaded_variant_is_saved_again(custom, tmp_path):
    opened = load_compressed(custom.folder)
    assert save_variant(opened, opened.transformer, custom.plan, custom.kwargs, tmp_path / "again") == "custom"
    assert_same_weights(load_compressed(tmp_path / "again").transformer, custom.student)
    generated = [sorted(folder.rglob("*.py")) for folder in (custom.folder, tmp_path / "again")]
    assert [file.name for file in generated[0]] == [file.name for file in generated[1]]


def test_modelling_file_opens_and_saves_itself_again(custom, tmp_path):
    opened = DiffusionPipeline.from_pretrained(custom.folder, trust_remote_code=True)
    assert_same_weights(opened.transformer, custom.student)
    assert {type(block).__name__ for block in opened.transformer.transformer_blocks} == {"FluxTransformerBlock"}
    opened.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_same_weights(again.transformer, custom.student)
    alone = AutoModel.from_pretrained(str(tmp_path / "again" / "transformer"), trust_remote_code=True)
    assert_same_weights(alone, custom.student)
    with torch.no_grad():
        assert torch.allclose(alone(**custom.kwargs)[0], custom.output(), atol=1e-6)


def test_whole_pipeline_runs(custom):
    generator = torch.Generator().manual_seed(0)
    images = load_compressed(custom.folder)(
        "a red square", height=16, width=16, num_inference_steps=2, generator=generator, output_type="np"
    ).images
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["stock", "custom"])
def test_fresh_process_computes_the_same(kind, request):
    saved = request.getfixturevalue(kind)
    assert verify_variant(saved.folder, saved.opens, saved.kwargs, saved.output(), 1e-5) < 1e-5


def test_a_variant_in_a_relative_folder_opens_elsewhere(custom, monkeypatch):
    """As in `--out runs/tiny`: the fresh process works in a folder of its own."""
    monkeypatch.chdir(custom.folder.parents[1])
    relative = custom.folder.relative_to(custom.folder.parents[1])
    assert verify_variant(relative, "custom", custom.kwargs, custom.output(), 1e-5) < 1e-5


def test_fresh_process_that_computes_something_else_or_nothing(broken, custom):
    (file,) = broken.rglob("modeling*.py")
    file.write_text(file.read_text().replace("class NarrowFlux", "import ppcl_toolkit\n\n\nclass NarrowFlux"))
    with pytest.raises(PpclError, match="does not open as custom in a fresh process.*ppcl_toolkit"):
        verify_variant(broken, "custom", custom.kwargs, custom.output(), 1e-5)


def test_a_fresh_process_works_where_a_later_run_clears_away(stock, monkeypatch):
    places = []

    def killed(*_, cwd, **__):
        places.append(cwd)
        raise KeyboardInterrupt

    monkeypatch.setattr(variant.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        verify_variant(stock.folder, "stock", stock.kwargs, stock.output(), 1e-5)
    assert Path(places[0]).parent == stock.folder.parent
    assert Path(places[0]).suffix == ".partial"


def test_difference_beyond_the_tolerance(stock, monkeypatch):
    for wrong in (stock.output() + 1, stock.output() * float("nan"), stock.output()[:1]):
        monkeypatch.setattr(variant, "_run_elsewhere", lambda *_, found=wrong: {"stock": found})
        with pytest.raises(PpclError, match="differs by|returns"):
            verify_variant(stock.folder, stock.opens, stock.kwargs, stock.output(), 1e-5)


def test_types_are_kept(tmp_path):
    saved = Saved(tmp_path / "half", WIDTH, torch.bfloat16)
    opened = load_compressed(saved.folder, dtype=torch.bfloat16)
    assert_same_weights(opened.transformer, saved.student)
    assert {p.dtype for p in load_compressed(saved.folder).transformer.parameters()} == {torch.float32}


def test_modelling_file_stands_alone(custom):
    (file,) = custom.folder.rglob("*.py")
    source = file.read_text()
    assert "ppcl_toolkit" not in source
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=200", "-"],
        input=source,
        text=True,
        check=False,
    )
    assert done.returncode == 0


def test_existing_folder_and_leftovers(stock, custom, tmp_path):
    with pytest.raises(PpclError, match="exists already"):
        save_variant(stock.pipeline, stock.student, stock.plan, stock.kwargs, stock.folder)
    leftover = tmp_path / "variant.partial"
    leftover.mkdir()
    (leftover / "half-written").touch()
    save_variant(stock.pipeline, stock.student, stock.plan, stock.kwargs, tmp_path / "variant")
    assert not leftover.exists()
    assert not (tmp_path / "variant" / "half-written").exists()
    with pytest.raises(PpclError, match="the plan leaves 9 blocks"):
        plan = custom.plan.with_operations(())
        save_variant(stock.pipeline, stock.student, plan, stock.kwargs, tmp_path / "other")


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "no pipeline folder": lambda folder: (folder / "model_index.json").unlink(),
    "is not a plan": lambda folder: (folder / "plan.json").write_text("{}"),
    "block_calls": lambda folder: (folder / "block_calls.json").unlink(),
    r"diffusion_pytorch_model.safetensors is missing, cut off": lambda folder: cut(
        folder / "transformer" / "diffusion_pytorch_model.safetensors"
    ),
    r"text_encoder/model.safetensors is missing, cut off": lambda folder: cut(
        folder / "text_encoder" / "model.safetensors"
    ),
    "transformer holds no": lambda folder: next((folder / "transformer").glob("*.safetensors")).unlink(),
    "cannot be opened": lambda folder: shutil.rmtree(folder / "vae"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_broken_folders_say_what_is_broken(broken, message):
    DAMAGES[message](broken)
    with pytest.raises(PpclError, match=message):
        load_compressed(broken)


def named_code(folder, family):
    """Let a variant's plan name code for its adapter."""
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "family": family}))


@pytest.mark.parametrize("opened", [load_compressed, lambda folder: load_pipeline(str(folder))])
def test_no_code_that_a_plan_names_is_imported(broken, monkeypatch, opened):
    (broken / "stranger.py").write_text("raise SystemExit('imported')")
    named_code(broken, "stranger:ADAPTER")
    monkeypatch.syspath_prepend(broken)
    monkeypatch.chdir(broken)
    with pytest.raises(PpclError, match="'stranger:ADAPTER', which is code"):
        opened(broken)
    assert "stranger" not in sys.modules


def test_an_adapter_that_the_user_names_opens_a_variant_of_it(broken, custom, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from ppcl_toolkit.adapters.flux import ADAPTER as MINE")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    named_code(broken, "mine:MINE")
    assert_same_weights(load_pipeline(str(broken), torch.float32, adapter="mine:MINE").transformer, custom.student)
    with torch.no_grad():
        expected = custom.student(**custom.kwargs)[0]
    assert verify_variant(broken, "custom", custom.kwargs, expected, 1e-5, adapter="mine:MINE") <= 1e-5
    with pytest.raises(PpclError, match="'mine:MINE', which is code"):
        verify_variant(broken, "custom", custom.kwargs, expected, 1e-5)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"scheduler": ["stranger", "Scheduler"]}, "takes scheduler from 'stranger'"),
        ("block_calls.json", None, "'save' is no type of tensors"),
    ],
)
def test_nothing_else_in_a_variant_names_code(broken, monkeypatch, file, changes, message):
    (broken / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(broken)
    content = (broken / file).read_text()
    changed = {**json.loads(content), **changes} if changes else json.loads(content.replace("float32", "save"))
    (broken / file).write_text(json.dumps(changed))
    with pytest.raises(PpclError, match=message):
        load_compressed(broken)
    assert "stranger" not in sys.modules


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "plan.json",
            {"depths": {STACK: 10**8}},
            f"not a plan: depths.{STACK}: .* less than or equal to 1000",
        ),
        ("transformer/config.json", {"num_layers": 10**6}, "transformer/config.json: 'num_layers' is 1000000, and no"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "text_encoder/config.json: 'num_hidden_layers' is"),
        ("text_encoder/config.json", {"inner": {"num_layers": 10**6}}, "'num_layers' is 1000000"),
    ],
)
def test_no_file_asks_for_more_layers_than_a_model_has(broken, file, changes, message):
    (broken / file).write_text(json.dumps({**json.loads((broken / file).read_text()), **changes}))
    began = time.monotonic()
    for opened in (load_compressed, lambda folder: load_pipeline(str(folder))):
        with pytest.raises(PpclError, match=message):
            opened(broken)
    if file != "plan.json":
        (broken / "plan.json").unlink()
        with pytest.raises(PpclError, match=message):
            load_pipeline(str(broken))
    assert time.monotonic() - began < 5


def test_a_rank_that_no_layer_has_is_no_plan(custom):
    low = {"kind": "modulation_swap", "stack": STACK, "rank": 10**9}
    with pytest.raises(ValidationError, match="less than or equal to 65536"):
        Plan.model_validate({**custom.plan.model_dump(), "operations": [low]})


def test_a_dry_run_makes_no_million_of_layers(broken):
    path = broken / "transformer" / "config.json"
    config = {**json.loads(path.read_text()), "num_layers": 10**6, "_class_name": "FluxTransformer2DModel"}
    path.write_text(json.dumps(config))
    with pytest.raises(PpclError, match="'num_layers' is 1000000"):
        Model.of(Recipe.model_validate({"teacher": {"path": str(broken)}, "targets": [{"name": "a", "params": "50%"}]}))


def test_plan_that_does_not_fit_the_weights(broken, custom):
    custom.plan.with_operations(WIDTH[:-1]).save(broken / "plan.json")
    with pytest.raises(PpclError, match="does not fit its plan|cannot be opened"):
        load_compressed(broken)
    custom.plan.with_operations(WIDTH[2:]).save(broken / "plan.json")
    with pytest.raises(PpclError, match="the plan leaves 9 blocks"):
        load_compressed(broken)
