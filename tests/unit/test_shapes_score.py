import numpy as np
import pytest

from ppcl_toolkit.shapes.scenes import CATEGORIES, CONSONANTS, VOWELS, Object, Scene, render, sample, scene_of
from ppcl_toolkit.shapes.score import chance, detect, score, score_by_category


def picture(caption, seed=0):
    rng = np.random.default_rng(seed)
    return render(scene_of(caption, rng), rng)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("category", CATEGORIES)
def test_ground_truth_is_perfect(category, held_out):
    rng = np.random.default_rng(0)
    pairs = [sample(rng, category, held_out=held_out) for _ in range(200)]
    scores = score_by_category([caption for caption, _ in pairs], [render(scene, rng) for _, scene in pairs])
    assert scores == {category: 1.0, "overall": 1.0}


def test_every_letter_is_read():
    words = [c + v + d for c, v, d in zip(CONSONANTS, VOWELS * 2, CONSONANTS[::-1], strict=True)]
    assert all(score(f"the word {word}", picture(f"the word {word}")) for word in words)


def test_pixel_noise_does_not_matter():
    rng = np.random.default_rng(1)
    pairs = [sample(rng) for _ in range(200)]
    noisy = [np.clip(render(s, rng) + rng.normal(0, 10, (32, 32, 3)), 0, 255).astype(np.uint8) for _, s in pairs]
    assert score_by_category([caption for caption, _ in pairs], noisy)["overall"] >= 0.99


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a red circle", "a blue circle"),
        ("a red circle", "a red ring"),
        ("a circle", "two circles"),
        ("three circles", "two circles"),
        ("three circles", "four circles"),
        ("a circle and a square", "a circle"),
        ("a circle and a square", "a circle and a ring"),
        ("a circle left of a square", "a circle right of a square"),
        ("a circle left of a square", "a circle above a square"),
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("the word CAT", "the word CUT"),
        ("the word CAT", "the word TAC"),
        ("the word CAT", "a circle"),
        ("a circle", "the word CAT"),
        ("a circle on black", "a circle on white"),
    ],
)
def test_anything_else_scores_false(caption, shown):
    assert not score(caption, picture(shown))
    assert score(shown, picture(shown))


def test_what_a_caption_leaves_open_is_free():
    assert score("a circle", picture("a red circle on black"))
    assert score("a circle and a square", picture("a square above a circle on gray"))


def test_an_object_too_many_and_a_smear_score_false():
    image = picture("a red circle on black")
    smeared = image.copy()
    smeared[0:9, 0:32:2] = 255
    assert not score("a red circle", smeared)


def test_detection_recovers_the_scene():
    scene = Scene("gray", (Object("ring", "cyan", 8, 8), Object("cross", "red", 24, 24)))
    found = detect(render(scene, np.random.default_rng(2)))
    assert found.background == "gray"
    assert [(o.shape, o.color) for o in found.objects] == [("ring", "cyan"), ("cross", "red")]
    assert all(abs(a.x - b.x) <= 2 and abs(a.y - b.y) <= 2 for a, b in zip(found.objects, scene.objects, strict=True))


def test_noise_alone_is_not_a_scene():
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    assert score_by_category(["a circle"] * 20, images)["overall"] == 0


def test_a_picture_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="32, 32, 3"):
        detect(np.zeros((24, 24, 3), dtype=np.uint8))


def test_chance_compares_with_other_captions_of_the_category():
    captions = ["a red circle", "a blue circle", "a ring", "a square"]
    levels = chance(captions, [picture(caption) for caption in captions])
    assert levels == {"colors": 0.0, "single_object": 0.0, "overall": 0.0}
    assert chance(captions[:1], [picture(captions[0])]) == {}
    captions = ["a circle", "one circle"]
    assert chance(captions, [picture(caption) for caption in captions])["overall"] == 1.0
