"""What a command cannot do is one sentence and no traceback, said before anything is drawn or made."""

import errno
import sys

import numpy as np
import pytest
from PIL import Image

from ppcl_toolkit.cli import main
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.images import pixels, read_image
from ppcl_toolkit.trouble import explained


def said(monkeypatch, capfd, *words):
    monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (1, 2)
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and "mistake of ppcl's" not in told
    return told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{folder}/none/a.png"], "there is no folder"),
        (["--out", "{folder}/a.xyz"], "no format of images is called '.xyz'; name a .png"),
        (["--out", "{folder}"], "no format of images is called ''"),
        (["--call", "num_inference_steps=0"], "--call num_inference_steps is a whole number from 1 on, not 0"),
        (["--call", "height=abc"], "--call height is a whole number from 1 on, not 'abc'"),
        (["--call", "sigmas=[1, 1e400]"], "--call sigmas holds what is no number: [1, inf]"),
        (["--call", 'joint_attention_kwargs={"scale": NaN}'], "--call joint_attention_kwargs holds what is no number"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed"),
        (["--call", "max_sequence_length=600"], "does not take these arguments: `max_sequence_length` cannot be"),
        (["--call", "max_sequence_length=100000"], "--call max_sequence_length is at most 65,536, not 100000"),
        (["--call", "num_inference_steps=100000000"], "--call num_inference_steps is at most 10,000"),
        (["--call", "height=7"], "height is 7, and the smallest picture of this pipeline is 8 pixels"),
        (["--call", "latents=3"], "does not take these arguments: 'int' object has no attribute 'to' (it was given"),
        (["--call", "joint_attention_kwargs=3"], "does not take these arguments: 'int' object has no attribute 'get'"),
        (["--call", "return_dict=false"], "--call return_dict is not for recipes and options to set"),
        (["--call", "num_images_per_prompt=2"], "--call num_images_per_prompt is not for recipes and options to set"),
    ],
)
def test_generate_says_what_it_cannot_draw(monkeypatch, capfd, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    assert message in said(monkeypatch, capfd, "generate", "shapes", "--prompt", "a red circle", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seeds", "message"), [("-1", "greater than or equal to 0"), ("x", "--seeds"), ("9" * 20, "less")]
)
def test_eval_says_what_seeds_there_are(monkeypatch, capfd, tmp_path, seeds, message):
    assert message in said(monkeypatch, capfd, "eval", "shapes", "--seeds", seeds, "--out", tmp_path / "eval")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("height: 7", "height is 7, and the smallest picture of this pipeline is 8 pixels"),
        ("latents: 3", "does not take these arguments: 'int' object has no attribute 'to'"),
        ("num_images_per_prompt: 2", "call.num_images_per_prompt is not for recipes and options to set"),
    ],
)
def test_compress_says_which_call_the_teacher_does_not_take(monkeypatch, capfd, tmp_path, argument, message):
    asked = ["--set", "device=cpu", "--set", f"teacher.call={{{argument}}}", "--out", tmp_path / "run"]
    assert message in said(monkeypatch, capfd, "compress", "--recipe", "tiny", *asked)
    assert not list(tmp_path.glob("run/*/*.safetensors"))
    # Sizes are known before the first stage begins.
    assert (tmp_path / "run" / "check.partial").exists() == ("latents" in argument)


@pytest.mark.parametrize("deeper", ["", "run"])
def test_links_that_lead_in_a_circle_are_named(monkeypatch, capfd, tmp_path, deeper):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    asked = ["compress", "--recipe", "tiny", "--set", "device=cpu", "--out", tmp_path / "one" / deeper]
    assert "cannot work in" in said(monkeypatch, capfd, *asked)
    assert "is no run" in said(monkeypatch, capfd, "verify", tmp_path / "one" / deeper)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_what_a_file_system_refuses_is_one_sentence(number, tmp_path):
    assert str(explained(OSError(number, "x"), tmp_path)).startswith(f"cannot open or write {tmp_path}: ")


def test_a_name_that_is_too_long_is_cut_in_the_message(monkeypatch, capfd):
    told = said(monkeypatch, capfd, "generate", "x" * 5000, "--prompt", "a")
    assert told.startswith("error: cannot open or write xxx") and told.endswith("...: its name is too long")
    assert len(told) < 400


@pytest.mark.parametrize("size", [0, 8, 60, -300])
def test_a_picture_that_is_cut_off_is_named(tmp_path, size):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:size])
    for read in (pixels, lambda path: read_image(path, "evaluate.edits")):
        with pytest.raises(PpclError, match="a.png is no image that can be read"):
            read(path)
