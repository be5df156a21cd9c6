"""What can be known from the recipe, its files and the teacher's config is said before the first sample is made."""

import importlib
import sys

import pytest

from ppcl_toolkit import compress, export_target
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe

TARGETS = [{"name": "half", "params": "50%"}]
DUAL = "transformer_blocks"


def asked(**sections):
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}
    teacher = {"path": "shapes", "dtype": "float32", "call": call}
    base = {"device": "cpu", "teacher": teacher, "targets": TARGETS}
    return Recipe.model_validate({**base, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"samples": {"prompts": "nowhere.txt"}}, "samples.prompts: cannot read 'nowhere.txt'"),
        ({"samples": {"images": "nowhere"}}, "samples.images"),
        ({"evaluate": {"prompts": "nowhere.txt"}}, "nowhere.txt"),
        ({"evaluate": {"edits": "nowhere"}}, "evaluate.edits"),
        ({"targets": [{"name": "a", "params": "9B"}]}, "'9B' is not smaller than the teacher's 5,025,760 parameters"),
        ({"targets": [{"name": "a", "params": "60%", "depth": "50%"}]}, "depth 50% is below params 60%"),
        ({"intervals": {"first_block": {"blocks": 1}}}, "no stack 'blocks'"),
        (
            {"intervals": {"strategy": "given", "given": [{"stack": DUAL, "first": 3, "last": 8}]}},
            r"transformer_blocks\[3,8\].*blocks 0 to 7",
        ),
        (
            {"width": {"given": [{"kind": "ffn_swap", "stack": DUAL, "block": 8, "streams": ["image"]}]}},
            r"given operations: transformer_blocks\[8\] ffn image: the stack has blocks 0 to 7",
        ),
    ],
)
def test_it_is_known_before_the_first_sample(sections, message, tmp_path):
    with pytest.raises(PpclError, match=message):
        compress(asked(**sections), tmp_path / "run")
    assert not list((tmp_path / "run").glob("samples*"))


def test_a_wrong_adapter_is_known_before_the_first_sample(tmp_path, monkeypatch):
    (tmp_path / "mended.py").write_text(
        "import dataclasses\n"
        "from ppcl_toolkit.adapter import load_adapter\n"
        "own = load_adapter('flux')\n"
        "dual = dataclasses.replace(own.stacks[0], text_query=('attn.add_k_proj', 'attn.norm_added_q'))\n"
        "ADAPTER = dataclasses.replace(own, stacks=(dual, own.stacks[1]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PpclError, match="text_query of transformer_blocks names 'attn.add_k_proj', without which"):
        compress(asked(adapter="mended:ADAPTER"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("samples*"))
    # Mended, the same command goes on.
    text = (tmp_path / "mended.py").read_text().replace("add_k_proj", "add_q_proj")
    (tmp_path / "mended.py").write_text(text)
    monkeypatch.delitem(sys.modules, "mended")
    importlib.invalidate_caches()
    with pytest.raises(_SampledError):
        compress(asked(adapter="mended:ADAPTER"), tmp_path / "run", progress=_until_samples)
    assert (tmp_path / "run" / "check" / "noising.json").is_file()
    # What was checked is that adapter: another one is not taken for it.
    (tmp_path / "mended.py").write_text(text.replace("add_q_proj", "add_v_proj"))
    monkeypatch.delitem(sys.modules, "mended")
    importlib.invalidate_caches()
    with pytest.raises(
        PpclError, match="was made with another adapter 'flux': adapter.stacks was .*; use another --out"
    ):
        compress(asked(adapter="mended:ADAPTER"), tmp_path / "run")


class _SampledError(Exception):
    pass


def _until_samples(stage, *_):
    if stage == "samples":
        raise _SampledError


@pytest.mark.parametrize("name", ["/tmp/evil", "../../evil", "teacher", "a.partial", ".hidden", "con"])
def test_a_variant_has_the_name_of_a_folder_in_its_run(name, tmp_path):
    with pytest.raises(PpclError, match="^name: "):
        export_target(tmp_path, "60%", name)
    assert not list(tmp_path.iterdir())
