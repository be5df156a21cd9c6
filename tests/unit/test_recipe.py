"""A recipe is strict: what it does not know it names, with the line and the nearest key."""

import re
import time

import pytest
import yaml
from pydantic import ValidationError

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import PRESETS, Finetune, Recipe, Samples
from ppcl_toolkit.recipe_files import shipped_recipes

SMALLEST = "teacher: {path: shapes}\ntargets:\n  - {name: a, params: 70%}\n"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return Recipe.load(path, overrides)

    return load


def refusal(load, text, *overrides):
    with pytest.raises(PpclError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_a_teacher_and_a_target_are_enough(load):
    recipe = load(SMALLEST)
    assert (recipe.depth.steps, recipe.depth.init, recipe.targets[0].width) == (6000, "first", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dept: {steps: 3}\n", "job.yaml line 4: dept: unknown key, did you mean 'depth'?"),
        ("depth:\n  steps: 3\n  learning_rat: 1\n", "line 6: depth.learning_rat: unknown key, did you mean 'learning_"),
        ("depth:\n  xyzzy: 1\n", "line 5: depth.xyzzy: unknown key; known: steps, batch, learning_rate"),
        ("width: {given: [{kind: text_run, stack: a, reference: 0, lst: 3}]}\n", "did you mean 'last'?"),
        ("width: {given: [{kind: ffn_swap, stack: a, blok: 0}]}\n", "blok: unknown key, did you mean 'block'?"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(load, text, message):
    assert message in refusal(load, SMALLEST + text)


def test_a_switch_with_a_third_position_names_all_three(load):
    found = refusal(load, SMALLEST, "teacher.streamed=maybe")
    assert found == "--set: teacher.streamed: Input should be True, False or 'auto', not 'maybe'"
    assert load(SMALLEST, "teacher.streamed=true").teacher.streamed is True


def test_what_is_wrong_with_the_whole_is_said_without_the_whole(load):
    found = refusal(load, SMALLEST + "modulation: {rank: 4}\n")
    assert found == "job.yaml: no target has modulation: true, so the section modulation has no use"


def test_an_unknown_key_of_a_target_is_found_in_the_list(load):
    text = "teacher: {path: shapes}\ntargets:\n  - {name: a, params: 70%}\n  - name: b\n    parms: 50%\n"
    found = refusal(load, text)
    assert "job.yaml line 5: targets.1.parms: unknown key, did you mean 'params'?" in found
    text = "teacher: {path: shapes}\ntargets:\n  - {name: a, params: 70%}\n  - name: b\n"
    assert "job.yaml line 4: targets.1: params, bytes, flops are missing" in refusal(load, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth:\n  steps: many\n", r"line 5: depth\.steps: .*valid integer.*, not 'many'"),
        ("depth: {steps: -1}\n", r"line 4: depth\.steps: .*greater than or equal to 0, not -1"),
        ("depth: {learning_rate: 0}\n", r"depth\.learning_rate: .*greater than 0, not 0"),
        ("depth: {init: last}\n", r"depth\.init: Input should be 'first', 'best' or 'average', not 'last'"),
        ("depth: 5\n", r"line 4: depth: .*, not 5"),
        ("width: {text_threshold: 1.5}\n", r"width\.text_threshold: .*less than or equal to 1, not 1\.5"),
        ("preset: papr\n", r"preset: Input should be 'default' or 'paper', not 'papr'"),
        ("evaluate: {seeds: 3}\n", r"evaluate\.seeds: .*, not 3"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_its_rule(load, text, message):
    assert re.search(message, refusal(load, SMALLEST + text))


def test_what_is_missing_is_named(load):
    assert "teacher: Field required" in refusal(load, "targets: [{name: a, params: 70%}]\n")
    assert "targets: Field required" in refusal(load, "teacher: {path: shapes}\n")
    assert "targets" in refusal(load, "teacher: {path: shapes}\ntargets: []\n")
    assert "line 1: teacher.path: Field required" in refusal(load, "teacher: {dtype: float32}\n")
    assert "Field required" in refusal(load, "")


def test_every_mistake_is_told_at_once(load):
    assert len(refusal(load, SMALLEST + "dept: 1\ndepth: {steps: -1}\nseed: x\n").splitlines()) == 3


def test_text_that_is_no_recipe_is_refused(load, tmp_path):
    assert "is not YAML" in refusal(load, "depth: {steps: 3\n")
    assert "holds no mapping" in refusal(load, "- depth\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PpclError, match="is not YAML"):
        Recipe.load(tmp_path / "binary.yaml")
    with pytest.raises(PpclError, match=r"no recipe 'tinny': give a YAML file or one of .*tiny"):
        Recipe.load("tinny")


def test_targets_differ_in_name_and_names_are_folders(load):
    twice = "teacher: {path: shapes}\ntargets: [{name: a, params: 70%}, {name: a, params: 50%}]\n"
    assert "targets share a name: ['a', 'a']" in refusal(load, twice)
    assert "targets.0.name" in refusal(load, "teacher: {path: x}\ntargets: [{name: ../a, params: 70%}]\n")


def test_overrides_go_over_the_file(load):
    recipe = load(SMALLEST, "depth.steps=7", "depth.betas=[0.5, 0.6]", "seed=3", "teacher.call.height=8")
    assert (recipe.depth.steps, recipe.depth.betas, recipe.seed) == (7, (0.5, 0.6), 3)
    assert recipe.teacher.call == {"height": 8}
    assert load(SMALLEST + "depth: {steps: 5, batch: 3}\n", "depth.steps=7").depth.batch == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("depth.steps", r"--set 'depth.steps': expected section.key=value"),
        ("depth.stepps=3", r"^--set: depth.stepps: unknown key, did you mean 'steps'"),
        ("=3", "expected section.key=value"),
        ("seed.x=3", "'seed' has no keys of its own"),
        ("depth.steps={", "the value is not YAML"),
        ("depth.stepz=3", "depth.stepz: unknown key, did you mean 'steps'?"),
        ("depth.steps=many", "depth.steps: .*, not 'many'"),
    ],
)
def test_a_wrong_override_is_refused(load, override, message):
    text = refusal(load, SMALLEST + "seed: 1\n", override)
    assert re.search(message.replace("?", r"\?"), text)


def test_the_preset_paper_has_the_papers_values_and_can_be_overridden(load):
    recipe = load(SMALLEST + "preset: paper\ndepth: {steps: 9}\n", "width.batch=4")
    assert recipe.probe.steps == PRESETS["paper"]["probe"]["steps"] == 2000
    assert (recipe.depth.steps, recipe.depth.batch) == (9, 2)
    assert (recipe.width.steps, recipe.width.batch) == (2000, 4)
    assert load(SMALLEST, "preset=paper").probe.steps == 2000
    assert load(SMALLEST).probe.steps == 0


def test_a_target_may_be_tuned_otherwise_than_the_rest(load):
    own = "{name: b, params: 50%, finetune: {steps: 90}}, {name: c, params: 60%, finetune: false}"
    targets = f"targets=[{{name: a, params: 70%, finetune: true}}, {own}]"
    recipe = load(SMALLEST, targets, "finetune.steps=30", "finetune.learning_rate=0.1")
    assert recipe.tuned == ("a", "b") and recipe.tuning("a") == recipe.finetune
    assert recipe.tuning("b") == recipe.finetune.model_copy(update={"steps": 90}) == recipe.answered
    assert "did you mean 'steps'?" in refusal(load, SMALLEST, "targets=[{name: a, params: 70%, finetune: {step: 3}}]")
    assert "finetune" in refusal(load, SMALLEST, "targets=[{name: a, params: 70%, finetune: maybe}]")
    alone = load(SMALLEST, "targets=[{name: a, params: 70%, finetune: false}]")
    assert alone.tuned == () and alone.answered == alone.finetune


def test_a_dumped_recipe_loads_as_itself(load):
    recipe = load(
        SMALLEST
        + "preset: paper\ndepth: {steps: 9, clip: null, betas: [0.1, 0.2]}\nintervals: {given: "
        + "[{stack: a, first: 0, last: 3}]}\nwidth: {given: [{kind: ffn_swap, stack: a, block: 3, streams: [image]}]}\n"
    )
    assert load(recipe.dump()) == recipe
    assert yaml.safe_load(recipe.dump())["depth"]["learning_rate"] == recipe.depth.learning_rate


def test_a_recipe_never_changes(load):
    recipe = load(SMALLEST)
    with pytest.raises(ValidationError):
        recipe.depth.steps = 3


def test_shipped_recipes_load_by_name():
    assert "tiny" in shipped_recipes()
    for name in shipped_recipes():
        assert Recipe.load(name) == Recipe.load(f"{name}.yaml")


def test_the_schema_describes_every_section():
    schema = Recipe.model_json_schema()
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Depth"]["properties"]["init"]["enum"] == ["first", "best", "average"]


def test_images_and_edits_are_two_sources():
    with pytest.raises(ValidationError, match="not both"):
        Samples(images="a", edits="b")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 2: 'seed' stands here twice"),
        ("depth: {steps: 1, steps: 2}\n", "line 1: 'steps' stands here twice"),
        ("seed: " + "9" * 6000 + "\n", "line 1: a number of 6,000 characters"),
        ("samples: {sigma_mean: .nan}\n", "line 1: .nan is no number of a recipe"),
        ("samples: {sigma_mean: -.inf}\n", "line 1: -.inf is no number of a recipe"),
        ("samples: {sigma_mean: 1.0e+999}\n", "is no number of a recipe"),
        (BOMB, "aliases make it larger than any recipe"),
        ("a: &a [*a]\n", "an alias names what it is in"),
        ("[" * 5000, "it is larger or deeper than any recipe"),
        ("a: " + "[1, " * 50 + "1" + "]" * 50, "it is larger or deeper than any recipe"),
        ("x: [" + "1, " * 30_000 + "]", "it is larger or deeper than any recipe"),
        ("# " + "x" * 1_000_001, "it has 1,000,003 characters"),
        ("teacher: {path: 2024-99-99}\n", "a timestamp is no value of a recipe"),
        ("teacher: {path: !!python/object/apply:os.system [ls]}\n", "is no value of a recipe"),
        ("teacher: {path: !!binary aGk=}\n", "a binary is no value of a recipe"),
        ("? [a, b]\n: 1\n", "a key is a single word"),
    ],
)
def test_yaml_that_is_no_recipe_is_one_line_at_once(load, text, message):
    started = time.monotonic()
    said = refusal(load, text)
    assert message in said and "\n" not in said and len(said) < 400
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        f"targets: [{{name: a, params: {'x' * 5000}}}]\n",
        f"targets: [{{name: {'x' * 5000}, params: 50%}}]\n",
        f"{'x' * 1000}: 1\n",
        f"targets: [{{name: a, params: 50%}}, {', '.join([f'{{params: {chr(120) * 5000}}}'] * 40)}]\n",
    ],
)
def test_long_values_are_cut_in_what_is_told(load, text):
    said = refusal(load, text)
    assert "x..." in said and len(said) < 5000 and max(map(len, said.splitlines())) < 600


def test_anchors_and_merges_are_fine(load):
    recipe = load(SMALLEST + "probe: &some {batch: 3}\nintervals: {<<: *some, batches: 2}\n")
    assert recipe.probe.batch == recipe.intervals.batch == 3


@pytest.mark.parametrize("override", ["samples.sigma_mean=.nan", "seed=" + "9" * 5000, "depth={steps: 1, steps: 2}"])
def test_overrides_are_as_strict(load, override):
    said = refusal(load, SMALLEST, override)
    assert said.startswith("--set ") and "the value is not YAML for a recipe" in said and len(said) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [{"name": "a", "params": "150%"}]}, "'150%': a share is below 100%"),
        ({"targets": [{"name": "a", "params": "100%"}]}, "'100%': a share is below 100%"),
        ({"targets": [{"name": "a", "params": "-5%"}]}, "'-5%': expected a share"),
        ({"targets": [{"name": "a", "params": "0"}]}, "'0': expected a share"),
        ({"targets": [{"name": "a", "params": "nonsense"}]}, "'nonsense': expected a share"),
        ({"targets": [{"name": "a", "params": "50%", "depth": "much"}]}, "'much': expected a share"),
        ({"targets": [{"name": "teacher", "params": "50%"}]}, "stands for something else"),
        ({"targets": [{"name": "con", "params": "50%"}]}, "stands for something else"),
        ({"targets": [{"name": "a.partial", "params": "50%"}]}, "stands for something else"),
        ({"targets": [{"name": "../../evil", "params": "50%"}]}, "a name has letters"),
        ({"targets": [{"name": "a", "params": "50%"}, {"name": "A", "params": "40%"}]}, "targets share a name"),
        ({"depth": {"betas": [1, 1]}}, "less than 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**40}, "less than 4294967296"),
        ({"evaluate": {"seeds": []}}, "at least 1 item"),
        ({"evaluate": {"seeds": [-3]}}, "greater than or equal to 0"),
        ({"evaluate": {"seeds": [1, 0, 1]}}, "stands there twice: 1, 0, 1"),
        ({"samples": {"prompts": "a\n.txt"}}, "has a character that no name has"),
        ({"teacher": {"path": "x", "call": {"num_inference_steps": 0}}}, "call.num_inference_steps is a whole number"),
        ({"teacher": {"path": "x", "call": {"height": "abc"}}}, "call.height is a whole number from 1 on, not 'abc'"),
        ({"teacher": {"path": "x", "call": {"guidance_scale": -1}}}, "call.guidance_scale is a number from 0 on"),
    ],
)
def test_what_no_teacher_could_do_is_refused_with_the_recipe(changes, message):
    base = {"teacher": {"path": "x"}, "targets": [{"name": "a", "params": "50%"}]}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({**base, **changes})
    assert message in str(caught.value)


def test_numbers_that_are_none_are_refused_from_python_too():
    with pytest.raises(ValidationError, match="finite number"):
        Finetune(steps=1, features=float("nan"))


def test_long_values_are_cut_in_messages(load):
    said = refusal(load, SMALLEST + f"seed: {'x' * 5000}\n")
    assert "not 'xxxx" in said and len(said) < 400
