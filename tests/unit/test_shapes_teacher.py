import numpy as np
import pytest
import torch

from ppcl_toolkit.shapes import teacher
from ppcl_toolkit.shapes.flow import TextToLatent, dropped_blocks, pack, tokenize
from ppcl_toolkit.shapes.muon import Muon, orthogonalise
from ppcl_toolkit.shapes.progress import load_if_there, save_atomically, warmup_stable_decay
from ppcl_toolkit.shapes.scenes import sample
from ppcl_toolkit.shapes.vae import to_images, to_tensor


@pytest.fixture(scope="module")
def captions():
    rng = np.random.default_rng(0)
    return [sample(rng, held_out=bool(i % 2))[0] for i in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "pipeline"
    model = TextToLatent()
    teacher.save(teacher.build(teacher.autoencoder(), model.transformer, (model.clip, model.t5)), path)
    return path


def test_tokenizers_keep_order_and_know_every_word(captions):
    t5, clip = teacher.t5_tokenizer(), teacher.clip_tokenizer()
    for caption in captions:
        pieces = t5.convert_ids_to_tokens(t5(caption).input_ids)
        assert "<unk>" not in pieces and pieces[-1] == "</s>"
        assert "".join(pieces[:-1]).replace("▁", " ").strip() == caption
        merged = clip.convert_ids_to_tokens(clip(caption).input_ids)[1:-1]
        assert "".join(merged).replace("</w>", " ").strip() == caption.lower()


def test_each_word_is_one_token_and_each_caption_fits(captions):
    t5, clip = teacher.t5_tokenizer(), teacher.clip_tokenizer()
    assert all(len(t5(word).input_ids) == 2 for word in teacher.vocabulary())
    assert all(len(clip(word).input_ids) == 3 for word in teacher.vocabulary())
    assert max(len(ids) for tokenizer in (t5, clip) for ids in tokenizer(captions).input_ids) <= 16


def test_saved_tokenizers_give_the_ids_of_training(folder, captions):
    pipeline = teacher.load(folder)
    t5_ids, clip_ids = tokenize(captions)
    options = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    assert torch.equal(pipeline.tokenizer_2(captions, **options).input_ids, t5_ids.long())
    assert torch.equal(pipeline.tokenizer(captions, **options).input_ids, clip_ids.long())


def test_the_folder_is_a_pipeline_and_small(folder):
    pipeline = teacher.load(folder)
    images = pipeline(
        ["a red circle", "the word CAT"],
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="np",
    ).images
    assert images.shape == (2, 32, 32, 3)
    assert np.isfinite(images).all()
    assert teacher.size_in_bytes(folder) < 24e6
    assert len(pipeline.transformer.transformer_blocks) + len(pipeline.transformer.single_transformer_blocks) >= 24


def test_saving_again_keeps_the_card(folder):
    (folder / "README.md").write_text("card")
    teacher.save(teacher.load(folder), folder)
    assert (folder / "README.md").read_text() == "card"


def test_training_calls_the_model_as_the_pipeline_does(folder):
    model = TextToLatent()
    pipeline = teacher.load(folder)
    model.transformer, model.t5, model.clip = pipeline.transformer, pipeline.text_encoder_2, pipeline.text_encoder
    t5_ids, clip_ids = tokenize(["a red circle left of nothing"[:12]])
    with torch.no_grad():
        sequence, pooled = model.text(t5_ids.long(), clip_ids.long())
        theirs = pipeline.encode_prompt(["a red circle"], None, max_sequence_length=16)
    assert torch.allclose(sequence, theirs[0], atol=1e-5)
    assert torch.allclose(pooled, theirs[1], atol=1e-5)


def test_dropped_blocks_come_back():
    model = TextToLatent().transformer
    before = [id(block) for block in model.transformer_blocks]
    with dropped_blocks(model, np.random.default_rng(0), 0.5):
        assert len(model.transformer_blocks) < 8
    assert [id(block) for block in model.transformer_blocks] == before


def test_packing_makes_sixteen_tokens():
    assert pack(torch.zeros(3, 8, 8, 8)).shape == (3, 16, 32)


def test_pictures_survive_the_way_to_tensors_and_back():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(to_images(to_tensor([image]))[0], image)


def test_a_broken_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "flow.safetensors"
    save_atomically({"step": 1}, path)
    with pytest.raises(AssertionError, match="a function on disk"):
        save_atomically({"step": lambda: None}, path)
    assert load_if_there(path) == {"step": 1}
    assert load_if_there(tmp_path / "none.safetensors") is None


def test_the_state_of_an_optimizer_comes_back_as_it_was(tmp_path):
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98))
    (weights[0].sum() + weights[1].square().sum()).backward()
    optimizer.step()
    save_atomically({"optimizers": [optimizer.state_dict()]}, tmp_path / "a.safetensors")
    (found,) = load_if_there(tmp_path / "a.safetensors")["optimizers"]
    wanted = optimizer.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert found["state"].keys() == wanted["state"].keys() == {0, 1}
    for number, state in wanted["state"].items():
        assert all(torch.equal(found["state"][number][name], value) for name, value in state.items())


def test_the_learning_rate_ends_at_zero():
    shape = [warmup_stable_decay(done, 100) for done in range(101)]
    assert shape[0] == 0 and shape[50] == 1 and shape[100] == 0
    assert all(a >= b for a, b in zip(shape[1:], shape[2:], strict=False))


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((4, 16, 16), (4, 8, 32), (4, 32, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.5


def test_muon_descends():
    torch.manual_seed(0)
    weight, target = torch.nn.Parameter(torch.zeros(8, 16)), torch.randn(8, 16)
    optimizer = Muon([weight], 0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
