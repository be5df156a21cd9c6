"""Benchmark images: files where scorers look for them and no others, kept when they are there, shared by processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_suites import FILES, METADATA, PLACES, write
from tiny import flux_pipeline

from ppcl_toolkit.benchmarks.drawing import Drawing, draw_suite
from ppcl_toolkit.benchmarks.suites import SUITES, find_suite
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.images import pixels

CALL = {"height": 8, "width": 8, "num_inference_steps": 1, "max_sequence_length": 16}
ROOTS = {"longtext": "longtext/en", "oneig": "oneig/en", "t2i-compbench": "t2i-compbench/color"}


def silent(stage, done, total, note=""):  # noqa: ARG001
    assert done <= total


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    flux_pipeline(1, 1).save_pretrained(folder)
    return str(folder)


def asked(name, folder, text=None, **changes):
    folder.mkdir(exist_ok=True)
    prompts = write(folder, FILES[name][0], text or FILES[name][1])
    return Drawing(**{"suite": find_suite(name), "prompts": prompts, "out": folder / "out", "call": CALL, **changes})


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SUITES)
def test_images_lie_where_the_scorer_looks(name, model, tmp_path):
    folders = draw_suite([model], asked(name, tmp_path, batch=4), silent)
    root = tmp_path / "out" / ROOTS.get(name, name)
    assert folders == [root if name == "oneig" else root / "tiny"]
    suite = find_suite(name)
    made = {path for path in files(root) if not path.startswith(".")}
    images = {path for path in made if not path.endswith(".jsonl")}
    assert set(PLACES[name]) <= images
    assert len(images) == len(PLACES[name]) * (1 if suite.grid else suite.images)
    with Image.open(root / PLACES[name][0]) as image:
        assert image.size == ((16, 16) if suite.grid else (8, 8))
        assert image.format == ("WEBP" if name == "oneig" else "PNG")
    if name == "geneval":
        assert json.loads((root / "tiny/00001/metadata.jsonl").read_text()) == METADATA[1]


def test_a_grid_is_the_images_row_by_row_and_seeds_count_up(model, tmp_path):
    draw_suite([model], asked("dpg", tmp_path, "item_id,text\n7,a cat\n", batch=3), silent)
    grid = pixels(tmp_path / "out/dpg/tiny/7.png")
    tiles = [grid[y : y + 8, x : x + 8].astype(int) for y in (0, 8) for x in (0, 8)]
    line = json.dumps({"prompt": "a cat", "tag": "colors"})
    for number, seed in enumerate((42, 43, 44, 45)):
        alone = tmp_path / str(seed)
        draw_suite([model], asked("geneval", alone, line, seed=seed), silent)
        # Kernels may round otherwise for other batch sizes: a level of 255 at most.
        first = pixels(alone / "out/geneval/tiny/00000/samples/0000.png")
        assert np.abs(tiles[number] - first).max() <= 1
    assert not np.array_equal(tiles[0], tiles[1])


def test_finished_images_are_kept_and_missing_ones_made_again(model, tmp_path):
    task = asked("longtext", tmp_path)
    draw_suite([model], task, silent)
    kept, lost = (tmp_path / f"out/longtext/en/tiny/0012_{number}.png" for number in (1, 3))
    wanted = pixels(lost)
    Image.new("RGB", (8, 8), "red").save(kept)
    lost.unlink()
    draw_suite([model], task, silent)
    assert (pixels(kept) == (255, 0, 0)).all()
    assert np.array_equal(pixels(lost), wanted)
    assert not list((tmp_path / "out").rglob("*.partial"))
    with pytest.raises(PpclError, match="holds images of tiny with another seed, call; give another --out"):
        draw_suite([model], asked("longtext", tmp_path, seed=1, call={**CALL, "num_inference_steps": 2}), silent)


def test_processes_share_the_prompts(tmp_path):
    task = asked("geneval", tmp_path, call={"num_inference_steps": 1})
    draw_suite(["shapes"], task, silent)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ppcl_toolkit.cli", "eval"]
    command += ["shapes", "--suite", "geneval", "--prompts", str(task.prompts), "--call", "num_inference_steps=1"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "shared")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("shapes 1/1 100%") == 2
    assert files(tmp_path / "out") == files(tmp_path / "shared")
    for path in (tmp_path / "out").rglob("*.png"):
        other = pixels(tmp_path / "shared" / path.relative_to(tmp_path / "out"))
        # The number of threads differs, and with it the order of sums.
        assert np.abs(pixels(path).astype(int) - other).max() <= 1


def test_mistakes(model, tmp_path):
    with pytest.raises(PpclError, match="told apart by their last name"):
        draw_suite([model, f"other/{model.rsplit('/', 1)[1]}"], asked("dpg", tmp_path), silent)
    with pytest.raises(PpclError, match="takes no argument 'steps'"):
        draw_suite([model], asked("dpg", tmp_path, call={"steps": 3}), silent)
    assert not files(tmp_path / "out")
    task = asked("geneval", tmp_path)
    task.prompts.write_text("")
    with pytest.raises(PpclError, match="holds no prompts"):
        draw_suite([model], task, silent)
