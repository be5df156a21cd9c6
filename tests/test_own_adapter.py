"""An adapter of one's own, by a module beside the recipe or on a relative path: found from beginning to end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.artifacts.variant import load_compressed
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.images import generator, image_path, pixels

STACK = "transformer_blocks"
RECIPE = """
adapter: own_family:ADAPTER
device: cpu
teacher:
  path: {folder}/teacher
  dtype: float32
  call: {{height: 8, width: 8, num_inference_steps: 2, max_sequence_length: 8}}
samples: {{prompts: {folder}/prompts.txt, count: 2, batch: 2}}
probe: {{batches: 1, batch: 2}}
intervals: {{batches: 1, batch: 2, strategy: given, given: [{{stack: transformer_blocks, first: 0, last: 1}}]}}
targets: [{{name: small, params: 65%}}]
select: {{batches: 1, batch: 2}}
depth: {{steps: 1, batch: 2}}
width:
  steps: 1
  batch: 2
  batches: 1
  given: [{{kind: ffn_swap, stack: transformer_blocks, block: 2, streams: [image, text]}}]
finetune: {{steps: 1, batch: 2}}
export: {{dtype: float32}}
evaluate: {{prompts: {folder}/prompts.txt, count: 1, seeds: [0], batch: 1, velocity_batches: 1}}
"""
MODULE = """
from dataclasses import replace
from own_help import FAMILY
from ppcl_toolkit.adapter import load_adapter
ADAPTER = replace(load_adapter("flux"), family=FAMILY)
"""
COMPRESS = ("compress", "--recipe", "job/recipe.yaml", "--out", "run")


@pytest.fixture
def world(tmp_path):
    tiny.flux_pipeline(3, 1).save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def module_in(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "own_family.py").write_text(MODULE)
    (folder / "own_help.py").write_text("FAMILY = 'own'\n")


def ppcl(world, *words, path=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # As the console script has it: the folder of the call is not on Python's path.
    command = [sys.executable, "-P", "-c", "from ppcl_toolkit.cli import main; main()", *words]
    return subprocess.run(
        command,
        cwd=world,
        env=environment | ({"PYTHONPATH": path} if path else {}),
        capture_output=True,
        text=True,
        check=False,
    )


def compressed(world, path=None):
    """The variant of a whole run."""
    done = ppcl(world, *COMPRESS, path=path)
    assert done.returncode == 0, done.stderr
    (variant,) = json.loads((world / "run/summary.json").read_text())["variants"]
    assert variant["opens"] == "custom"
    assert variant["memory_bytes"] is not None
    assert json.loads((world / "run/variants/small/plan.json").read_text())["family"] == "own_family:ADAPTER"
    return world / "run/variants/small"


def test_a_module_on_a_relative_path_is_found_to_the_end(world):
    module_in(world / "modules")
    # What is published does not bring its adapter along.
    with pytest.raises(PpclError, match="'own_family:ADAPTER', which is code"):
        load_compressed(compressed(world, path="modules"))


def test_a_module_beside_the_recipe_is_found_to_the_end_and_none_in_the_folder_of_a_run(world):
    module_in(world / "job")
    compressed(world)
    module_in(world / "run")
    again = ("export", "--run", "run", "--target", "params=65%", "--name", "again")
    done = ppcl(world, *again)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: adapter 'own_family:ADAPTER' cannot be imported: No module named 'own_family'; put its folder on "
        "PYTHONPATH, or the module beside your recipe"
    )
    assert "again: run/variants/again (custom" in ppcl(world, *again, path="job").stdout


def test_a_module_that_fails_is_one_sentence(world):
    (world / "job" / "own_family.py").write_text("ADAPTER = whatever\n")
    done = ppcl(world, *COMPRESS)
    assert done.stderr.splitlines() == [
        "error: adapter 'own_family:ADAPTER' cannot be imported: NameError: name 'whatever' is not defined"
    ]
    assert not (world / "run").exists()


OPENED = """
import sys, torch
sys.modules["ppcl_toolkit"] = None
from own_net import OwnPipeline
options = {"trust_remote_code": True} if sys.argv[2] == "custom" else {}
pipeline = OwnPipeline.from_pretrained(sys.argv[1], **options)
generator = torch.Generator().manual_seed(int(sys.argv[4]))
pipeline(["a"], [generator], num_inference_steps=2)[0][0].save(sys.argv[3])
print(type(pipeline.transformer).__name__, len(pipeline.transformer.trunk))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A whole run of a transformer and a pipeline that diffusers does not have, its modules beside the recipe."""
    world = tmp_path_factory.mktemp("own")
    shutil.copytree(Path(__file__).parent / "own_dit", world / "job", ignore=shutil.ignore_patterns("__pycache__"))
    (world / "prompts.txt").write_text("a\nb\nc\nd\n")
    making = (
        "import torch; from diffusers import FlowMatchEulerDiscreteScheduler; from own_net import OwnDit, OwnPipeline; "
        "torch.manual_seed(0); OwnPipeline(OwnDit(), FlowMatchEulerDiscreteScheduler()).save_pretrained('teacher')"
    )
    subprocess.run([sys.executable, "-c", making], cwd=world, env={**os.environ, "PYTHONPATH": "job"}, check=True)
    done = ppcl(world, "compress", "--recipe", "job/recipe.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return world


@pytest.mark.parametrize(
    ("name", "opens", "found"), [("depth", "stock", "OwnDit 3"), ("both", "custom", "NarrowOwnDit 3")]
)
def test_a_dit_that_diffusers_does_not_have_is_compressed(own, name, opens, found):
    """The variants open by the user's own module, without this package, and make the pictures of the run."""
    variants = {variant["name"]: variant for variant in json.loads((own / "run/summary.json").read_text())["variants"]}
    assert variants[name]["opens"] == opens
    index = json.loads((own / "run/variants" / name / "model_index.json").read_text())
    assert index["transformer"] == ["own_net", "OwnDit"] or opens == "custom"
    seed = str(generator(0, 0).initial_seed())
    done = subprocess.run(
        [sys.executable, "-c", OPENED, f"run/variants/{name}", opens, f"{name}.png", seed],
        cwd=own,
        env={**os.environ, "PYTHONPATH": "job"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == found, done.stderr
    made, expected = pixels(own / f"{name}.png"), pixels(image_path(own / "run/evaluate" / name, 0, 0))
    assert abs(made.astype(int) - expected).max() <= 1
    assert expected.std() > 10


def test_a_class_that_a_folder_names_is_not_imported(own, monkeypatch):
    monkeypatch.syspath_prepend(own / "job")
    folder = own / "run/variants/depth"
    said = (
        "takes its transformer from 'own_net', which is code: name it in an adapter of yours, transformer='own_net:Own"
    )
    with pytest.raises(PpclError, match=said):
        load_compressed(folder)
    with pytest.raises(PpclError, match=said):
        load_pipeline(str(own / "teacher"))
    assert "own_net" not in sys.modules
    adapter = load_adapter("own_adapter:ADAPTER")
    for name in ("depth", "both"):
        opened = load_compressed(own / "run/variants" / name, adapter=adapter)
        assert len(opened.transformer.trunk) == 3
        assert type(opened).__name__ == "OwnPipeline"
