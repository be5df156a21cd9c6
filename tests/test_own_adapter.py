"""An adapter of one's own, by a module beside the recipe or on a relative path: found from beginning to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ppcl_toolkit.artifacts.variant import load_compressed
from ppcl_toolkit.errors import PpclError

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
