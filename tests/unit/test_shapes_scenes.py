import numpy as np
import pytest

from ppcl_toolkit.shapes.scenes import (
    CATEGORIES,
    CONTENTS,
    category_of,
    evaluation_prompts,
    is_held_out,
    parse,
    render,
    sample,
    scene_of,
)


@pytest.mark.parametrize("category", CATEGORIES)
def test_sampled_captions_parse_to_their_category_and_scene(category):
    rng = np.random.default_rng(0)
    for _ in range(200):
        caption, scene = sample(rng, category)
        expectation = parse(caption)
        assert expectation.category == category == category_of(caption)
        assert [o.shape for o in scene.objects] == [shape for shape, _ in expectation.objects]
        assert all(color in ("", o.color) for (_, color), o in zip(expectation.objects, scene.objects, strict=True))
        assert expectation.background in ("", scene.background)


@pytest.mark.parametrize(
    "caption",
    ["", "a red", "a heptagon", "the word CTA", "five circles", "a circle on purple", "a circle beside a ring"],
)
def test_a_foreign_caption_is_refused_by_name(caption):
    with pytest.raises(ValueError, match=repr(caption)):
        parse(caption)


def test_training_and_evaluation_captions_are_disjoint():
    rng = np.random.default_rng(1)
    training = {sample(rng)[0] for _ in range(3000)}
    evaluation = set(evaluation_prompts(100))
    assert len(evaluation) == 700
    assert not training & evaluation
    words = {caption.partition("the word ")[2][:3] for caption in training} - {""}
    unseen = {caption.partition("the word ")[2][:3] for caption in evaluation} - {""}
    assert not words & unseen


def test_held_out_sampling_draws_held_out_captions_only():
    rng = np.random.default_rng(2)
    assert all(is_held_out(sample(rng, held_out=True)[0]) for _ in range(200))


def test_about_one_caption_in_five_is_held_out():
    shares = [is_held_out(content) for contents in CONTENTS.values() for content in contents]
    assert 0.15 < np.mean(shares) < 0.25


def test_evaluation_prompts_are_balanced_distinct_and_repeatable():
    prompts = evaluation_prompts(72, seed=5)
    assert len(set(prompts)) == 72 * len(CATEGORIES) == len(prompts)
    assert [category_of(p) for p in prompts] == [c for c in CATEGORIES for _ in range(72)]
    assert prompts == evaluation_prompts(72, seed=5) != evaluation_prompts(72, seed=6)


def test_more_evaluation_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="single_object"):
        evaluation_prompts(10_000)


def test_drawing_depends_on_the_generator_alone():
    scene = scene_of("a red circle and a blue square on black", np.random.default_rng(3))
    first, second = (render(scene, np.random.default_rng(4)) for _ in range(2))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)
