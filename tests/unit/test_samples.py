"""Samples are what the pipeline really passes and really makes."""

import copy
import resource
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from runs import desk, equal

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.samples import load_samples, prompts, record_samples

FLUX = load_adapter("flux")
CALL = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 6}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.flux_pipeline(1, 1)


@pytest.fixture
def record(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n\n" for i in range(5)))

    def record(folder="out", call=(), **section):
        section = {"prompts": str(tmp_path / "prompts.txt"), **section}
        recipe = Recipe.model_validate(
            {
                "seed": 3,
                "teacher": {"path": "x", "call": {**CALL, **dict(call)}},
                "samples": section,
                "targets": [{"name": "a", "params": "50%"}],
            }
        )
        record_samples(
            Runner(pipeline.transformer, FLUX), Teacher(pipeline, FLUX, "flux", "x"), recipe, desk(tmp_path / folder)
        )
        return load_samples(tmp_path / folder)

    return record


def calls_of(pipeline, *args, **kwargs):
    """What `pipeline` passes to its transformer at every call, and the latents it ends with."""
    seen = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(copy.deepcopy(kwargs)), with_kwargs=True
    )
    latents = pipeline(*args, **kwargs, output_type="latent").images
    handle.remove()
    return seen, latents


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_samples_are_the_pipelines_own_arguments_and_latents(pipeline, record):
    samples = record(count=3, batch=2)
    texts = [f"prompt number {i}" for i in range(3)]
    for start, stop in ((0, 2), (2, 3)):
        calls, latents = calls_of(
            pipeline, texts[start:stop], generator=generators(*range(3 + start, 3 + stop)), **CALL
        )
        for row, sample in enumerate(samples[start:stop]):
            assert torch.equal(sample.latents, latents[row : row + 1])
            assert sample.reference is None
            expected = calls[0]
            assert sample.arguments.keys() == expected.keys() - {"hidden_states", "timestep", "return_dict"}
            for name, value in sample.arguments.items():
                if isinstance(value, torch.Tensor):
                    whole = expected[name]
                    assert torch.equal(value, whole if name in FLUX.shared else whole[row : row + 1]), name
                else:
                    assert value == expected[name]


def test_a_sample_without_noise_is_a_call_that_the_pipeline_could_make(pipeline, record):
    samples = record(count=2, batch=1)
    batch = Batches(samples=samples, adapter=FLUX, size=2, seed=0)[0]
    calls, _ = calls_of(pipeline, ["a", "b"], **CALL)
    for name, value in calls[0].items():
        if isinstance(value, torch.Tensor):
            assert batch[name].shape == value.shape, name
            assert batch[name].dtype == value.dtype, name
    assert pipeline.transformer(**batch)[0].shape == batch["hidden_states"].shape


def test_files_that_are_there_are_kept(record, tmp_path):
    whole = record("whole", count=5, batch=2)
    record("half", count=5, batch=2)
    files = sorted((tmp_path / "half").iterdir())
    assert [file.name for file in files] == ["000000.safetensors", "000002.safetensors", "000004.safetensors"]
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    again = record("half", count=5, batch=2)
    assert files[0].stat().st_mtime_ns == kept
    assert len(again) == len(whole) == 5
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.arguments["encoder_hidden_states"], other.arguments["encoder_hidden_states"])


def maps_of(folder):
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the maps of a process")
def test_many_files_need_neither_many_open_files_nor_many_maps(record, tmp_path):
    record(count=1, batch=1)
    (first,) = (tmp_path / "out").iterdir()
    for number in range(1, 300):
        (tmp_path / "out" / f"{number:06d}.safetensors").hardlink_to(first)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, before[1]))
    try:
        samples = load_samples(tmp_path / "out")
        kept = list(Batches(samples=samples, adapter=FLUX, size=4, seed=0)(0, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(samples) == 300 and len(kept) == 100
    assert maps_of(tmp_path / "out") == 0


def test_a_damaged_file_is_named_before_anything_is_read(record, tmp_path):
    record(count=2, batch=1)
    path = tmp_path / "out" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PpclError, match=r"000001.safetensors is damaged"):
        load_samples(tmp_path / "out")


def test_classifier_free_guidance_gives_two_samples_a_prompt(pipeline, record):
    call = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    samples = record(count=2, batch=1, call=call)
    assert len(samples) == 4
    calls, latents = calls_of(pipeline, ["prompt number 0"], generator=generators(3), **CALL, **call)
    assert len(calls) == 4  # two a step
    for sample, expected in zip(samples[:2], calls[:2], strict=True):
        assert torch.equal(sample.latents, latents)
        assert torch.equal(sample.arguments["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert not torch.equal(*(s.arguments["encoder_hidden_states"] for s in samples[:2]))


def test_one_negative_prompt_serves_a_whole_batch(record):
    call = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    single, batched = record("single", count=2, batch=1, call=call), record("batched", count=2, batch=2, call=call)
    texts = [sorted(float(s.arguments["encoder_hidden_states"].sum()) for s in found) for found in (single, batched)]
    assert len(batched) == 4
    assert texts[0] == pytest.approx(texts[1], abs=1e-3)


def test_images_with_captions_are_encoded(pipeline, record, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(8, 8), (20, 12)]):
        Image.new("RGB", size, (255, 40 * i, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}\n")
    before = copy.deepcopy(pipeline.transformer.state_dict())
    samples = record(images=str(folder), count=10)
    assert len(samples) == 2
    for i, sample in enumerate(samples):
        with Image.open(folder / f"{i}.png") as image:
            pixels = pipeline.image_processor.preprocess(image.convert("RGB").resize((8, 8), Image.Resampling.LANCZOS))
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.mode()
        latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        packed = pipeline._pack_latents(latents, *latents.shape)
        assert torch.equal(sample.latents, packed)
        calls, _ = calls_of(pipeline, [f"caption {i}"], **CALL)
        assert torch.equal(sample.arguments["encoder_hidden_states"], calls[0]["encoder_hidden_states"])
        assert sample.arguments["img_ids"].shape[0] == packed.shape[1]
    assert equal(before, pipeline.transformer.state_dict())
    assert not pipeline.transformer._forward_pre_hooks


def test_prompts_of_the_embedded_world_are_drawn_by_seed():
    section = Recipe.model_validate({"teacher": {"path": "x"}, "targets": [{"name": "a", "params": "5%"}]}).samples
    assert prompts(section, 1) == prompts(section, 1)
    assert prompts(section, 1) != prompts(section, 2)
    assert len(prompts(section, 1)) == section.count


def test_prompts_that_cannot_be_read_are_one_sentence(record, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PpclError, match=r"samples.prompts: cannot read '.*none.txt': No such file"):
        record(prompts=str(tmp_path / "none.txt"))
    with pytest.raises(PpclError, match=r"samples.prompts: '.*empty.txt' has no prompt"):
        record(prompts=str(tmp_path / "empty.txt"))
    with pytest.raises(PpclError, match=r"samples.prompts: cannot read '.*binary.txt'"):
        record(prompts=str(tmp_path / "binary.txt"))


def test_image_folders_that_cannot_be_used_are_one_sentence(record, tmp_path):
    folder = tmp_path / "photos"
    with pytest.raises(PpclError, match="samples.images: .*photos is no folder"):
        record(images=str(folder))
    folder.mkdir()
    with pytest.raises(PpclError, match="no image in it"):
        record(images=str(folder))
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(PpclError, match=r"no text \(.txt\) beside a.png"):
        record(images=str(folder))
    (folder / "a.txt").write_text("a caption")
    with pytest.raises(PpclError, match=r"samples.images: .*a.png.* is no image"):
        record(images=str(folder))


def test_arguments_that_the_pipeline_does_not_take_are_one_sentence(record):
    with pytest.raises(PpclError, match=r"takes no argument .heigth.; did you mean .height."):
        record(call={"heigth": 8})
