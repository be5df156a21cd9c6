"""`ppcl adapters check`: what an adapter allows is tried, and what is wrong with it is said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import strangers
import tiny
from families import FLUX

from ppcl_toolkit import check_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit import trial
from ppcl_toolkit.kit.trial import trials

TRIED = ["fields", "blocks", "dead text", "depth", "FFNs", "text", "modulation"]
SMALL = {"height": 8, "width": 8, "num_inference_steps": 4, "max_sequence_length": 8}


@pytest.mark.parametrize("family", ("flux", "qwen_image", "sd3"))
def test_shipped_adapters_hold_on_a_random_model(family):
    found = list(trials(family, None, {}))
    assert [each.name for each in found] == TRIED
    assert all(each.works for each in found), found


def test_a_pipeline_is_run_and_every_plan_is_opened_again(tmp_path):
    tiny.sd3_pipeline().save_pretrained(tmp_path)
    found = {each.name: each.result for each in trials("sd3", str(tmp_path), SMALL)}
    assert found["noise"] == "a rectified flow, told 1000 sigma"
    assert found["depth"].endswith("opens as stock")
    assert all(found[name].endswith("opens as custom") for name in ("FFNs", "text", "modulation"))


def test_a_video_is_tried_as_a_picture_is(tmp_path):
    """It has a stack of one stream: nothing of the text can be taken out, and that is no mistake."""
    strangers.wan_pipeline().save_pretrained(tmp_path)
    _, asked = strangers.STRANGERS["wan"]
    found = list(trials("wan", str(tmp_path), {**asked, "num_inference_steps": 3}))
    assert all(each.works for each in found), found
    assert {each.name: each.result for each in found}["text"] == "-"


@pytest.mark.parametrize(
    ("stack", "where", "said"),
    (
        ({"text_query": ("attn.add_k_proj",)}, "dead text", "names 'attn.add_k_proj'"),
        ({"returns": ("image", "text")}, "fields", "returns of transformer_blocks"),
        ({"ffn": {"image": "ff_context"}}, "blocks", "names 'ff_context' for the image, and without it"),
        ({"modulation": ("attn.to_q",)}, "blocks", "modulation is one vector for each"),
        ({"text_out": ()}, "dead text", "its own text with 'attn.to_add_out'"),
    ),
)
def test_what_is_wrong_is_said(stack, where, said, monkeypatch):
    wrong = replace(FLUX, stacks=(replace(FLUX.stacks[0], **stack), FLUX.stacks[1]))
    monkeypatch.setattr(trial, "load_adapter", lambda _: wrong)
    bad = [each for each in trials("flux", None, {}) if not each.works]
    assert [each.name for each in bad] == [where] and said in bad[0].result, bad


def test_a_test_of_ones_own_raises_what_fails(monkeypatch):
    assert [each.name for each in check_adapter("flux")] == TRIED
    wrong = replace(FLUX, stacks=(replace(FLUX.stacks[0], text_query=("attn.add_k_proj",)), FLUX.stacks[1]))
    monkeypatch.setattr(trial, "load_adapter", lambda _: wrong)
    with pytest.raises(PpclError, match="^dead text: .* names 'attn.add_k_proj'"):
        check_adapter("flux")


def test_the_command_ends_as_it_finds(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom ppcl_toolkit.adapter import load_adapter\nown = load_adapter('qwen_image')\n"
        "ADAPTER = dataclasses.replace(own, stacks=(dataclasses.replace(own.stacks[0], text_out=('attn.to_q',)),))\n"
    )
    command = [str(Path(sys.executable).with_name("ppcl")), "adapters", "check", "mine:ADAPTER"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "without which the image of block" in done.stdout.replace("\n", " "), done
