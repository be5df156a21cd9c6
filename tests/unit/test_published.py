"""Published checkpoints: what is imported computes what the published model file computes, and bad ones say why."""

import json
import shutil

import pytest
import torch
from by_hand import hand_made
from diffusers import DiffusionPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny import flux_pipeline, qwen_image_inputs, qwen_image_pipeline, qwen_image_transformer, randomize
from torch.nn.functional import gelu, layer_norm, linear, silu

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.published import KEYS, build, import_published, plan_of
from ppcl_toolkit.artifacts.variant import load_compressed, save_variant, verify_variant
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, ModulationSwap, Plan, TextRun
from ppcl_toolkit.surgery.assemble import student_of

STACK = "transformer_blocks"
INDICES = {"single_stream_index": [2, 3, 5, 7], "ffn_proj_index": [1, 3, 6, 7], "ehs_proj_index": [3, 7]}
PLAN = (
    TextRun(stack=STACK, reference=1, last=3),
    TextRun(stack=STACK, reference=4, last=5),
    TextRun(stack=STACK, reference=6, last=7),
    FfnSwap(stack=STACK, block=1, streams=("image", "text")),
    FfnSwap(stack=STACK, block=3, streams=("image",)),
    FfnSwap(stack=STACK, block=6, streams=("image", "text")),
    FfnSwap(stack=STACK, block=7, streams=("image",)),
)
DEAD = ("attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q")


def qwen_pipeline(transformer) -> QwenImagePipeline:
    pipeline = qwen_image_pipeline()
    pipeline.register_modules(transformer=transformer, text_encoder=pipeline.text_encoder.to(torch.bfloat16))
    return pipeline


def published_weights(transformer, indices) -> dict:
    """What the published model file stores: dead projections stay, modulations are halved, text modules are gone."""
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    width, depth = transformer.inner_dim, len(transformer.transformer_blocks)
    single, ffn, ends = (indices[key] for key in KEYS)
    torch.manual_seed(5)

    def add(name):
        weights[f"{name}.weight"] = 0.1 * torch.randn(width, width)
        weights[f"{name}.bias"] = 0.1 * torch.randn(width)

    for index in range(depth):
        block = f"{STACK}.{index}."
        gone = ["txt_mod", "txt_mlp"] if index in single else []
        if index in single:
            add(f"{block}txt_proj")
        if index in ends:
            add(f"{block}ehs_proj")
        if index in ffn:
            gone += ["img_mlp", "txt_mlp"]
            add(f"{block}img_ffn_proj")
            if index not in single:
                add(f"{block}txt_ffn_proj")
            for name in [n for n in weights if n.startswith((f"{block}img_mod", f"{block}txt_mod"))]:
                weights[name] = weights[name][: 3 * width].clone()
        for name in [n for n in weights if n.startswith(tuple(f"{block}{part}." for part in gone))]:
            del weights[name]
    return weights


class PublishedBlock:
    """One block by the published semantics, in plain torch: only its attention is stock."""

    def __init__(self, index, attention, weights, indices):
        self.single, self.ffn, self.end = (index in indices[key] for key in KEYS)
        self.attention, self.weights, self.path = attention, weights, f"{STACK}.{index}"

    def layer(self, name, value):
        return linear(value, *(self.weights[f"{self.path}.{name}.{part}"] for part in ("weight", "bias")))

    def modulation(self, stream, temb):
        return self.layer(f"{stream}_mod.1", silu(temb)).unsqueeze(1).chunk(3 if self.ffn else 6, dim=-1)

    def modulated(self, value, shift, scale):
        return layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def feed_forward(self, stream, value, modulation):
        if self.ffn:
            return value + self.layer(f"{stream}_ffn_proj", value)
        shift, scale, gate = modulation[3:]
        inner = gelu(self.layer(f"{stream}_mlp.net.0.proj", self.modulated(value, shift, scale)), approximate="tanh")
        return value + gate * self.layer(f"{stream}_mlp.net.2", inner)

    def forward(self, image, text, carried, temb, rotary):
        """Return the image, the text and the z that later blocks take theirs from."""
        shift, scale, gate = self.modulation("img", temb)[:3]
        if self.single:
            z = self.layer("txt_proj", carried) + carried
        else:
            text_modulation = self.modulation("txt", temb)
            carried = z = self.modulated(text, *text_modulation[:2])
        given = {"hidden_states": self.modulated(image, shift, scale), "encoder_hidden_states": z}
        image_out, text_out = self.attention(**given, encoder_hidden_states_mask=None, image_rotary_emb=rotary)
        image = self.feed_forward("img", image + gate * image_out, self.modulation("img", temb))
        if not self.single:
            text = self.feed_forward("txt", text + text_modulation[2] * text_out, text_modulation)
        elif self.end:
            text = self.layer("ehs_proj", text) + text
        return image, text, carried


@torch.no_grad()
def oracle(transformer, weights, indices, kwargs) -> torch.Tensor:
    """What a published checkpoint computes; what surrounds the blocks, and their attention, are the stock model's."""
    state = {"carried": None}

    def replaced(block):
        def forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, **_):
            image, text, state["carried"] = block.forward(
                hidden_states, encoder_hidden_states, state["carried"], temb, image_rotary_emb
            )
            return text, image

        return forward

    blocks = transformer.transformer_blocks
    for index, block in enumerate(blocks):
        block.forward = replaced(PublishedBlock(index, block.attn, weights, indices))
    output = transformer(**kwargs)[0]
    for block in blocks:
        del block.forward
    return output


class Checkpoint:
    """A tiny random checkpoint as it is published: a whole pipeline folder whose transformer class is foreign."""

    def __init__(self, folder, indices, dtype=torch.float32):
        self.folder, self.indices = folder, indices
        self.transformer = randomize(qwen_image_transformer(8), seed=1).to(dtype)
        self.weights = {n: v.to(dtype) for n, v in published_weights(self.transformer, indices).items()}
        qwen_pipeline(self.transformer).save_pretrained(folder)
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        save_file(self.weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        edit(folder / "transformer" / "config.json", **indices)
        edit(folder / "model_index.json", transformer=["transformer_qwenimage_pruning", "QwenImageTransformer2DModel"])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return Checkpoint(tmp_path_factory.mktemp("published") / "Qwen-Image-10B", INDICES)


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "variant"
    import_published(published.folder, folder)
    return folder


@pytest.fixture
def broken(published, tmp_path):
    shutil.copytree(published.folder, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Keep the copies that diffusers makes of modelling files out of the user's cache."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def output(transformer, kwargs) -> torch.Tensor:
    # A file that is mapped into memory is not aligned, and kernels then sum in another order: copies are.
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return transformer(**kwargs)[0]


def test_it_computes_what_the_published_model_file_computes(published, imported):
    kwargs = qwen_image_inputs()
    expected = oracle(published.transformer, published.weights, INDICES, kwargs)
    assert not torch.allclose(expected, published.transformer(**kwargs)[0], atol=1e-2)
    for opened in (load_compressed(imported), DiffusionPipeline.from_pretrained(imported, trust_remote_code=True)):
        assert torch.equal(output(opened.transformer, kwargs), expected)
    # In a fresh process the file is mapped: equal up to the order of sums.
    assert verify_variant(imported, "custom", kwargs, expected, 1e-5) < 1e-5


def test_the_plan_says_what_the_lists_say(imported):
    plan = Plan.load(imported / "plan.json")
    assert plan.operations == PLAN
    assert plan.depths == {STACK: 8}
    assert plan.history[0]["single_stream_index"] == [2, 3, 5, 7]


def test_weights_are_the_published_ones_without_the_dead(published, imported):
    state = load_file(imported / "transformer" / "diffusion_pytorch_model.safetensors")
    renamed = {"linear_text_z": "txt_proj", "linear_text_h": "ehs_proj"}
    renamed |= {"linear_ffn_image": "img_ffn_proj", "linear_ffn_text": "txt_ffn_proj"}
    taken = set()
    for name, value in state.items():
        origin = name
        for ours, theirs in renamed.items():
            origin = origin.replace(ours, theirs)
        if origin.startswith(f"{STACK}.5.ehs_proj"):
            assert not value.any()  # this run writes no text
        else:
            assert torch.equal(value, published.weights[origin])
            taken.add(origin)
    dead = {n for i in INDICES["single_stream_index"] for n in published.weights if n.startswith(paths(i))}
    assert set(published.weights) - taken == dead
    assert len(dead) == 4 * 5


def paths(index):
    return tuple(f"{STACK}.{index}.{path}." for path in DEAD)


def test_other_parts_of_the_pipeline_are_kept_and_it_runs(imported):
    opened = load_compressed(imported, dtype=torch.float32)
    assert json.loads((imported / "model_index.json").read_text())["text_encoder"][0] == "transformers"
    stored = load_file(imported / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    image = opened("a b", height=64, width=64, num_inference_steps=2, output_type="np", max_sequence_length=16)
    assert image.images.shape == (1, 64, 64, 3)


def test_a_transformer_alone_takes_the_rest_from_a_pipeline(published, tmp_path):
    alone = published.folder / "transformer"
    with pytest.raises(PpclError, match="--pipeline gives the other parts"):
        import_published(alone, tmp_path / "variant")
    qwen_pipeline(qwen_image_transformer(2)).save_pretrained(tmp_path / "base")
    import_published(alone, tmp_path / "variant", pipeline=str(tmp_path / "base"))
    kwargs = qwen_image_inputs()
    expected = oracle(published.transformer, published.weights, INDICES, kwargs)
    assert torch.equal(output(load_compressed(tmp_path / "variant").transformer, kwargs), expected)
    flux_pipeline(1, 1).save_pretrained(tmp_path / "flux")
    with pytest.raises(PpclError, match="flux"):
        import_published(alone, tmp_path / "other", pipeline=str(tmp_path / "flux"))


def test_half_precision_is_kept(tmp_path):
    half = Checkpoint(tmp_path / "half", INDICES, torch.bfloat16)
    import_published(half.folder, tmp_path / "variant")
    opened = load_compressed(tmp_path / "variant", dtype=torch.bfloat16)
    kwargs = {n: v.to(torch.bfloat16) if torch.is_tensor(v) else v for n, v in qwen_image_inputs().items()}
    expected = oracle(half.transformer, half.weights, INDICES, kwargs)
    # Here z is a view of [h, z], for which torch rounds a bfloat16 product once more before it adds the bias.
    assert torch.allclose(output(opened.transformer, kwargs), expected, atol=0.03)
    assert {parameter.dtype for parameter in opened.transformer.parameters()} == {torch.bfloat16}


def test_the_published_10b_loses_its_dead_projections():
    gone = "[[3,4],[5,7],[8,10],[11,12],[15,24],[25,27],[29,30],[42,43],[45,47],[48,49],[52,53],[54,55],[56,57]]"
    kept = sorted(set(range(60)) - {i for first, last in json.loads(gone) for i in range(first + 1, last + 1)})
    indices = {
        "single_stream_index": [i for i, block in enumerate(kept) if block in (37, 41) or block > 50],
        "ffn_proj_index": [kept.index(block) for block in (2, 58, 59)],
        "ehs_proj_index": [kept.index(block) for block in (37, 41, 59)],
    }
    with torch.device("meta"):
        full = QwenImageTransformer2DModel(num_layers=len(kept))
        weights = published_weights(full, indices)
    assert sum(value.numel() for value in weights.values()) == 10_603_653_184
    config = {**full.config, **indices}
    built = build(plan_of(config, "published"), config, weights)
    assert sum(value.numel() for value in built.parameters()) == 10_452_608_064


def test_half_precision_that_clips_is_refused(tmp_path):
    half = Checkpoint(tmp_path / "half", INDICES, torch.float16)
    with pytest.raises(PpclError, match="it takes a path of its own in torch.float16"):
        import_published(half.folder, tmp_path / "variant")


def test_weights_in_several_files(published, broken, tmp_path):
    names = sorted(published.weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weights_file(broken).unlink()
    for shard, part in shards.items():
        save_file({name: published.weights[name] for name in part}, broken / "transformer" / shard)
    index = broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, part in shards.items() for name in part}}))
    plan, _ = import_published(broken, tmp_path / "variant")
    assert plan.operations == PLAN
    (broken / "transformer" / "b.safetensors").unlink()
    with pytest.raises(PpclError, match="b.safetensors is missing, cut off or corrupt"):
        import_published(broken, tmp_path / "other")


def test_a_checkpoint_without_narrow_blocks_is_stock(tmp_path):
    plain = Checkpoint(tmp_path / "plain", dict.fromkeys(KEYS, []))
    plan, opens = import_published(plain.folder, tmp_path / "variant")
    assert (plan.operations, opens) == ((), "stock")
    kwargs = qwen_image_inputs()
    opened = DiffusionPipeline.from_pretrained(tmp_path / "variant")
    with torch.no_grad():
        assert torch.equal(output(opened.transformer, kwargs), plain.transformer(**kwargs)[0])


def test_text_that_a_middle_block_writes(tmp_path):
    indices = {"single_stream_index": [1, 2, 3], "ffn_proj_index": [], "ehs_proj_index": [2]}
    middle = Checkpoint(tmp_path / "middle", indices)
    import_published(middle.folder, tmp_path / "variant")
    kwargs = qwen_image_inputs()
    expected = oracle(middle.transformer, middle.weights, indices, kwargs)
    assert torch.equal(output(load_compressed(tmp_path / "variant").transformer, kwargs), expected)


def weights_file(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def changed(function):
    def damage(folder):
        weights = load_file(weights_file(folder))
        function(weights)
        save_file({name: value.clone() for name, value in weights.items()}, weights_file(folder))

    return damage


def configured(**changes):
    return lambda folder: edit(folder / "transformer" / "config.json", **changes)


def without_key(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != KEYS[1]}))


DAMAGES = {
    "has no ffn_proj_index: it is not in the published pruning format": without_key,
    "only published Qwen-Image checkpoints": configured(_class_name="FluxTransformer2DModel"),
    r"config.json cannot be read": lambda folder: (folder / "transformer" / "config.json").unlink(),
    "num_layers is None": configured(num_layers=None),
    r"single_stream_index is \[2, 8\]: expected a list of block numbers from 0 to 7": configured(
        single_stream_index=[2, 8]
    ),
    "ffn_proj_index is 'all': expected a list": configured(ffn_proj_index="all"),
    "a block is listed twice": configured(ffn_proj_index=[1, 1]),
    "single_stream_index holds 0": configured(single_stream_index=[0, 1]),
    r"ehs_proj_index holds \[4\], which single_stream_index lacks": configured(ehs_proj_index=[3, 4]),
    r"ehs_proj_index holds \[2, 3\]: blocks 2 to 3 write text twice": configured(ehs_proj_index=[2, 3]),
    r"lacks 2 tensors: transformer_blocks.2.txt_proj": changed(
        lambda weights: [weights.pop(f"{STACK}.2.txt_proj.{part}") for part in ("weight", "bias")]
    ),
    "has 1 unexpected tensors: transformer_blocks.0.txt_proj.weight": changed(
        lambda weights: weights.update({f"{STACK}.0.txt_proj.weight": torch.zeros(1)})
    ),
    r"transformer_blocks.1.img_mod.1.bias of the checkpoint is \[32\], and its indices ask for \[96\]": changed(
        lambda weights: weights.update({f"{STACK}.1.img_mod.1.bias": torch.zeros(32)})
    ),
    "lacks 32 tensors": configured(num_layers=9),
    "is missing, cut off or corrupt": lambda folder: weights_file(folder).write_bytes(
        weights_file(folder).read_bytes()[:-100]
    ),
    r"pickled weights \(\*.bin\) are not read": lambda folder: weights_file(folder).rename(folder / "model.bin"),
    "cannot be opened as a pipeline": lambda folder: shutil.rmtree(folder / "vae"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_bad_checkpoints_say_what_is_bad(broken, tmp_path, message):
    DAMAGES[message](broken)
    with pytest.raises(PpclError, match=message):
        import_published(broken, tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_a_folder_that_exists_and_one_that_does_not(published, tmp_path):
    with pytest.raises(PpclError, match="exists already"):
        import_published(published.folder, tmp_path)
    with pytest.raises(PpclError, match="is no pipeline folder"):
        import_published(tmp_path / "nowhere", tmp_path / "variant")


@torch.no_grad()
def test_what_is_imported_becomes_light(imported, tmp_path):
    pipeline, inputs = load_compressed(imported), qwen_image_inputs()
    adapter, transformer = load_adapter("qwen_image"), pipeline.transformer
    plan = Plan(family="qwen_image", depths={STACK: 8}, operations=(ModulationSwap(stack=STACK, rank=3),))
    by_numpy, bank = hand_made(transformer, inputs, adapter, 3)
    student = student_of(transformer, adapter, plan, bank, inputs)
    call = {**inputs, "timestep": inputs["timestep"].flip(0) * 0.3}
    expected, original = by_numpy(**call)[0], transformer(**call)[0]
    differs = (original - expected).abs().max()
    both = Plan.load(imported / "plan.json").compose(plan)
    assert both.text_runs and both.ffn_swaps and both.modulation_swaps
    save_variant(pipeline, student, both, inputs, tmp_path / "light")
    for found in (student, load_compressed(tmp_path / "light").transformer):
        assert (found(**call)[0] - expected).abs().max() < 1e-2 * differs
