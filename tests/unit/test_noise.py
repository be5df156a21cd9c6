"""Noised batches: a number is a batch, and noise is x_t = (1 - sigma) x_0 + sigma noise on the noised tokens."""

import dataclasses
from pathlib import Path

import pytest
import torch
from runs import FLUX, batches, runner, sample

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.noise import Batches, Recorded, collate
from ppcl_toolkit.running.noising import Noising


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one
    )


def test_the_same_number_is_the_same_batch():
    one, other = batches(), batches()
    assert same(one[3], other[3])
    assert [same(a, b) for a, b in zip(one(0, 4), list(other(2, 6)), strict=True)] == [False] * 4
    assert all(same(a, b) for a, b in zip(one(2, 4), list(other(0, 4))[2:], strict=True))
    assert not same(one[3], batches(seed=8)[3])
    # What a batch is does not depend on which batches came before it.
    other[0]
    assert same(one[5], other[5])


def test_latents_are_noised_to_the_level_of_the_timestep():
    all_samples = [sample(i) for i in range(6)]
    batch = batches(size=4)[1]
    generator = torch.Generator().manual_seed(7 * 1_000_003 + 1)
    torch.randint(6, (), generator=generator), torch.randint(6, (3,), generator=generator)
    torch.randn(4, generator=generator)
    noise = torch.randn(4, 9, 4, generator=generator)
    sigma = batch["timestep"].view(-1, 1, 1)
    clean = (batch["hidden_states"] - sigma * noise) / (1 - sigma)
    for row, text in zip(clean, batch["encoder_hidden_states"], strict=True):
        source = next(s for s in all_samples if torch.equal(s.arguments["encoder_hidden_states"][0], text))
        assert torch.allclose(row, source.latents[0], atol=1e-5)


def test_noise_is_standard_normal_and_levels_follow_the_recipe():
    still = [dataclasses.replace(sample(0), latents=torch.zeros(1, 9, 4))]
    noised = Batches(samples=still, adapter=FLUX, size=64, seed=0, sigma_mean=0.5, sigma_std=0.7)
    levels, values = [], []
    for batch in noised(0, 20):
        levels.append(batch["timestep"])
        values.append(batch["hidden_states"] / batch["timestep"].view(-1, 1, 1))
    logits, noise = torch.logit(torch.cat(levels)), torch.cat(values)
    assert abs(float(logits.mean()) - 0.5) < 0.07
    assert abs(float(logits.std()) - 0.7) < 0.07
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_the_timestep_is_scaled_as_the_pipeline_scales_it():
    plain, scaled = (
        Batches(samples=[sample()], adapter=FLUX, size=2, seed=1, noising=noising)[0]["timestep"]
        for noising in (Noising(), Noising(scale=1000.0))
    )
    assert torch.equal(scaled, plain * 1000)


def test_reference_tokens_follow_unchanged():
    reference = torch.randn(1, 5, 4)
    batch = Batches(samples=[dataclasses.replace(sample(), reference=reference)], adapter=FLUX, size=3, seed=0)[0]
    assert batch["hidden_states"].shape == (3, 9 + 5, 4)
    assert torch.equal(batch["hidden_states"][:, 9:], reference.expand(3, -1, -1))
    plain = Batches(samples=[sample()], adapter=FLUX, size=3, seed=0)[0]
    assert torch.equal(batch["hidden_states"][:, :9], plain["hidden_states"])


def test_samples_of_different_shapes_never_share_a_batch():
    mixed = [sample(0), sample(1, side=4), sample(2, text_tokens=3), sample(3), sample(4, side=4)]
    mixed.append(dataclasses.replace(sample(5), reference=torch.zeros(1, 2, 4)))
    drawn = Batches(samples=mixed, adapter=FLUX, size=4, seed=0)
    shapes = {(b["hidden_states"].shape[1], b["encoder_hidden_states"].shape[1]) for b in drawn(0, 60)}
    assert shapes == {(9, 5), (16, 5), (9, 3), (11, 5)}


def test_shared_arguments_have_no_batch_dimension():
    batch = batches(size=3)[0]
    assert batch["img_ids"].shape == (9, 3)
    assert batch["txt_ids"].shape == (5, 3)
    assert batch["guidance"].shape == (3,)
    assert runner().velocity(batch).shape == (3, 9, 4)


def test_latents_take_the_teachers_type_and_timesteps_do_not():
    batch = batches(dtype=torch.bfloat16)[0]
    assert batch["hidden_states"].dtype == torch.bfloat16
    assert batch["timestep"].dtype == torch.float32


def test_lists_are_joined_and_other_values_must_agree():
    calls = [{"shapes": [(1, 3, 3)], "scale": 1.0, "none": None}, {"shapes": [(1, 4, 4)], "scale": 1.0, "none": None}]
    assert collate(calls, ()) == {"shapes": [(1, 3, 3), (1, 4, 4)], "scale": 1.0, "none": None}
    with pytest.raises(PpclError, match=r"samples of one batch differ in scale: 1.0 and others; use batch: 1"):
        collate([{"scale": 1.0}, {"scale": 2.0}], ())


def in_files(samples, each=1):
    """Samples as files of `each` hold them; `opened` lists the files that were read, once per sample."""
    opened = []

    def read(path, rows):
        found = samples[int(path.name) * each : (int(path.name) + 1) * each][rows]
        opened.extend([path] * len(found))
        return found

    return Recorded([Path(str(i)) for i in range(len(samples) // each)], read), opened


@pytest.mark.parametrize("each", [1, 2])
def test_batches_of_recorded_samples_are_those_of_samples_in_memory(each):
    mixed = [sample(0), sample(1, side=4), sample(2, text_tokens=3), sample(3), sample(4, side=4), sample(5)]
    mixed[5] = dataclasses.replace(mixed[5], reference=torch.ones(1, 2, 4))
    recorded, _ = in_files(mixed, each)
    one, other = (Batches(samples=samples, adapter=FLUX, size=3, seed=2) for samples in (mixed, recorded))
    assert all(same(a, b) for a, b in zip(one(0, 30), other(0, 30), strict=True))


def test_recorded_samples_are_a_sequence_that_reads_what_is_asked_for():
    samples = [sample(i) for i in range(4)]
    recorded, opened = in_files(samples, each=2)
    assert len(recorded) == 4 and [path.name for path in opened] == ["0", "0", "1", "1"]
    opened.clear()
    assert torch.equal(recorded[2].latents, samples[2].latents)
    assert torch.equal(recorded[-1].arguments["guidance"], samples[3].arguments["guidance"])
    assert [path.name for path in opened] == ["1", "1"]
    assert [float(s.latents.sum()) for s in recorded[1:3]] == [float(s.latents.sum()) for s in samples[1:3]]
    with pytest.raises(IndexError):
        recorded[4]
    # What is read belongs to the reader alone.
    recorded[0].latents.zero_()
    assert samples[0].latents.any()


def test_only_the_samples_of_a_batch_are_read_for_it():
    recorded, opened = in_files([sample(i) for i in range(50)])
    drawn = Batches(samples=recorded, adapter=FLUX, size=3, seed=2)
    opened.clear()
    drawn[0]
    assert len(opened) == 3
