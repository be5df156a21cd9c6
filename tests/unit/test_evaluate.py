"""Evaluation: an image is its prompt's and seed's alone, what is there is kept, and equal pipelines measure equal."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Evaluate
from ppcl_toolkit.running.images import Exam, generate_images, image_path, pixels
from ppcl_toolkit.shapes import scenes
from ppcl_toolkit.stages.evaluate import compare, examine, load_measurement, measure, relative_error, velocities

CALL = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 16}
EXAM = Exam(prompts=("one", "two", "three"), scored=False, seeds=(0, 1), batch=2, call=CALL)


def silent(done, total, note=""):  # noqa: ARG001
    assert done <= total


def images(folder, exam=EXAM):
    return [pixels(image_path(folder, seed, i)) for seed in exam.seeds for i in range(len(exam.prompts))]


def test_an_image_does_not_depend_on_its_batch(tmp_path):
    pipeline = tiny.flux_pipeline(2, 2)
    generate_images(pipeline, EXAM, tmp_path / "pairs", silent)
    generate_images(pipeline, dataclasses.replace(EXAM, batch=1), tmp_path / "single", silent)
    for one, other in zip(images(tmp_path / "pairs"), images(tmp_path / "single"), strict=True):
        # Kernels may round otherwise for other batch sizes: a level of 255 at most.
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert not np.array_equal(*images(tmp_path / "pairs")[:2])


def test_images_that_are_there_are_kept_and_missing_ones_made_again(tmp_path):
    pipeline = tiny.flux_pipeline(2, 2)
    generate_images(pipeline, EXAM, tmp_path, silent)
    whole = images(tmp_path)
    mark = image_path(tmp_path, 0, 2)
    Image.new("RGB", (8, 8), "red").save(mark)
    image_path(tmp_path, 1, 1).unlink()
    generate_images(pipeline, EXAM, tmp_path, silent)
    assert (pixels(mark) == (255, 0, 0)).all()
    assert np.array_equal(pixels(image_path(tmp_path, 1, 1)), whole[4])


def test_a_pipeline_equals_itself(tmp_path):
    pipeline = tiny.flux_pipeline(2, 2)
    for name in ("teacher", "student"):
        measured = measure(pipeline, EXAM, tmp_path / name, progress=silent)
    same = compare(tmp_path / "student", tmp_path / "teacher", velocity_error=0.0)
    assert same.rmse == 0
    assert same.score is None
    assert measured.params == sum(p.numel() for p in pipeline.transformer.parameters())
    assert measured.bytes == 4 * measured.params
    assert measured.latency_ms > 0
    assert load_measurement(tmp_path / "student") == same
    assert compare(tmp_path / "student", tmp_path / "teacher", itemsize=2).bytes == 2 * measured.params


@pytest.mark.parametrize("seeds", [(0, 1), (3,)])
def test_flops_are_those_of_a_call_with_one_picture(tmp_path, seeds):
    pipeline, calls = tiny.flux_pipeline(2, 2), []
    exam = dataclasses.replace(EXAM, seeds=seeds)
    handle = pipeline.transformer.register_forward_pre_hook(lambda *given: calls.append(given[2]), with_kwargs=True)
    found = measure(pipeline, exam, tmp_path, progress=silent).flops
    handle.remove()
    batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    alone = {name: value[:1] if name in batched and value is not None else value for name, value in calls[0].items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.transformer(**alone)
    assert found == counter.get_total_flops() > 0
    # What has its images keeps its count.
    (tmp_path / "measurement.json").unlink()
    assert measure(pipeline, exam, tmp_path, progress=silent).flops == found


def test_another_pipeline_differs_and_is_measured_again(tmp_path):
    pipeline = tiny.flux_pipeline(2, 2)
    measure(pipeline, EXAM, tmp_path / "teacher", progress=silent)
    measure(pipeline, EXAM, tmp_path / "student", progress=silent)
    tiny.randomize(pipeline.transformer, seed=5)
    measure(pipeline, EXAM, tmp_path / "student", progress=silent)
    assert compare(tmp_path / "student", tmp_path / "teacher").rmse > 0


def test_the_velocity_error_is_the_relative_norm():
    transformer = tiny.flux_transformer(2, 2)
    batches = [tiny.flux_inputs(seed=seed) for seed in range(2)]
    found = velocities(transformer, load_adapter("flux"), batches)
    assert relative_error(found, found) == 0
    assert relative_error([1.1 * v for v in found], found) == pytest.approx(0.1, rel=1e-5)
    with torch.no_grad():
        assert torch.equal(found[1], transformer(**batches[1])[0])


def test_true_pictures_score_1_and_foreign_ones_do_not(tmp_path):
    pipeline = tiny.flux_pipeline(2, 2)
    exam = examine(Evaluate(count=14, seeds=(0,), batch=14), {**CALL, "height": 32, "width": 32})
    assert exam.scored
    assert len(set(exam.prompts)) == 14
    assert {scenes.category_of(prompt) for prompt in exam.prompts} == set(scenes.CATEGORIES)
    # Images that are there are kept, so true renders can stand for a perfect model's.
    measure(pipeline, exam, tmp_path, progress=silent)
    (tmp_path / "measurement.json").unlink()
    rng = np.random.default_rng(0)
    for index, prompt in enumerate(exam.prompts):
        picture = scenes.render(scenes.scene_of(prompt, rng), rng)
        Image.fromarray(picture).save(image_path(tmp_path, 0, index))
    perfect = measure(pipeline, exam, tmp_path, progress=silent)
    assert perfect.score == 1
    assert all(mean == 1 for mean, _ in perfect.categories.values())
    assert perfect.chance < 0.5


def test_one_prompt_alone_has_no_chance_and_its_figures_are_json(tmp_path):
    exam = examine(Evaluate(count=1, seeds=(0,)), {**CALL, "height": 32, "width": 32})
    for name in ("teacher", "student"):
        assert measure(tiny.flux_pipeline(2, 2), exam, tmp_path / name, progress=silent).chance is None
    assert compare(tmp_path / "student", tmp_path / "teacher", velocity_error=float("nan")).velocity_error is None
    for name in ("teacher", "student"):
        found = json.loads((tmp_path / name / "measurement.json").read_text(), parse_constant=pytest.fail)
        assert found["score"] is not None
        assert (found["chance"], found["velocity_error"]) == (None, None)


def test_an_argument_that_the_pipeline_does_not_take_is_named(tmp_path):
    exam = dataclasses.replace(EXAM, call={**CALL, "step": 3})
    with pytest.raises(PpclError, match="takes no argument 'step'"):
        measure(tiny.flux_pipeline(2, 2), exam, tmp_path, progress=silent)
