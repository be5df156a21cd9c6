"""The report of a made-up but realistic run: every number and operation is on the page, nothing is outside."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.shapes import scenes
from ppcl_toolkit.stages.intervals import Candidates, Curves, differences, trend_intervals
from ppcl_toolkit.stages.probe import Probes
from ppcl_toolkit.stages.report import write_report

DEPTHS = {"transformer_blocks": 8, "single_transformer_blocks": 16}
INTERVALS = (
    Interval(stack="transformer_blocks", first=2, last=4),
    Interval(stack="single_transformer_blocks", first=3, last=6),
    Interval(stack="single_transformer_blocks", first=9, last=11),
)
WIDTH = (
    TextRun(stack="transformer_blocks", reference=5, last=7),
    FfnSwap(stack="transformer_blocks", block=1, streams=("image", "text")),
    FfnSwap(stack="transformer_blocks", block=5, streams=("image",)),
)
PLANS = {
    "70": Plan(family="flux", depths=DEPTHS, operations=INTERVALS),
    "50": Plan(family="flux", depths=DEPTHS, operations=INTERVALS + WIDTH),
}


def measurement(score: float, params: int, **more) -> dict:
    by_category = {c: [round(score + 0.02 * (i - 3), 3), 0.03] for i, c in enumerate(scenes.CATEGORIES)}
    cost = {"params": params, "bytes": 2 * params, "flops": 25 * params}
    cost |= {"latency_ms": params / 4e5, "latency_batch": 35}
    memory = {"memory_bytes": 20 * params, "memory_of": "resident set growth of a fresh process"}
    compared = {"rmse": None, "velocity_error": None, "drop_percent": None}
    rest = {"score": score, "score_std": 0.0123, "categories": by_category, "chance": 0.041}
    return {**cost, **memory, **rest, **compared, **more}


SUMMARY = {
    "teacher": {"path": "shapes", "opens": "stock", **measurement(0.9231, 10_204_321)},
    "variants": [
        {"name": "70", "path": "variants/70", "opens": "stock"}
        | measurement(0.871, 7_012_345, rmse=21.3, velocity_error=0.1834, drop_percent=5.6),
        {"name": "50", "path": "variants/50", "opens": "custom"}
        | measurement(0.742, 5_023_456, rmse=38.7, velocity_error=0.3121, drop_percent=19.6),
    ],
}


def curves(depth: int, pace: float, rng: np.random.Generator) -> Curves:
    position = np.cumsum(rng.gamma(1.2, pace, depth))
    distance = np.abs(position[:, None] - position[None])
    heatmap = torch.tensor(np.exp(-distance)).float()
    chained = torch.tensor(np.exp(-1.6 * distance) - 0.003 * rng.random((depth, depth))).float().triu()
    chained.fill_diagonal_(1.0)
    return Curves(chained, differences(chained), heatmap)


def loss(steps: int, scale: float, rng: np.random.Generator) -> list:
    return [[s, float(scale * (0.1 + np.exp(-s / (0.2 * steps))) * rng.lognormal(0, 0.1))] for s in range(0, steps, 10)]


def candidate(operation, error: float, saves: int, chosen: list) -> dict:
    return {
        "operation": operation.model_dump(),
        "label": str(operation),
        "error": error,
        "saves": {"params": saves, "bytes": 2 * saves, "flops": 25 * saves},
        "chosen": chosen,
    }


def write_losses(run, rng: np.random.Generator) -> None:
    files = {
        "depth": {f"{i.stack}.{i.first}-{i.last}": loss(600, 0.3 * (n + 1), rng) for n, i in enumerate(INTERVALS)},
        "width": {f"{w.stack}.{n}": loss(300, 0.1 * (n + 1), rng) for n, w in enumerate(WIDTH)},
        "finetune/70": loss(400, 0.03, rng),
        "finetune/50": loss(400, 0.08, rng),
    }
    for name, losses in files.items():
        (run / name).mkdir(parents=True)
        (run / name / "losses.json").write_text(json.dumps(losses))


def write_findings(run, rng: np.random.Generator) -> None:
    for name in ("probe", "intervals", "select"):
        (run / name).mkdir(parents=True)
    found = {
        stack: {"image": curves(depth, 0.03, rng), "text": curves(depth, 0.008, rng)} for stack, depth in DEPTHS.items()
    }
    spans = {stack: [s for s in trend_intervals(c["image"].delta, 1) if s[0] < s[1]] for stack, c in found.items()}
    intervals = {stack: tuple(Interval(stack=stack, first=u, last=v) for u, v in s) for stack, s in spans.items()}
    compared = {stack: {"image": (16, 160), "text": (160, 160)} for stack in DEPTHS}
    stability = {stack: tuple(0.25 for _ in own) for stack, own in intervals.items()}
    elsewhere = {stack: {"the first half": ((0, 7),)} for stack in DEPTHS}
    Candidates(intervals, (WIDTH[0],), found, compared, stability, elsewhere).save(run / "intervals")
    keys = [(stack, b, stream) for stack, depth in DEPTHS.items() for b in range(depth) for stream in ("image", "text")]
    shares = {key: float(rng.lognormal(-2 if key[2] == "image" else -3.5, 0.6)) for key in keys}
    Probes({key: torch.zeros(2, 2) for key in keys}, shares).save(run / "probe")
    measured = [candidate(o, 0.02 * (n + 1), 900_000, ["70", "50"]) for n, o in enumerate(INTERVALS)]
    measured += [candidate(o, 0.03 * (n + 1), 150_000, ["50"]) for n, o in enumerate(WIDTH)]
    measured.append(candidate(Interval(stack="transformer_blocks", first=5, last=7), 0.31, 1_100_000, []))
    measured.append(candidate(intervals["transformer_blocks"][0], 0.4, 1_100_000, []))
    (run / "select" / "measured.json").write_text(json.dumps(measured))


def write_images(run, seeds=(0, 1, 2)) -> None:
    prompts = [p for i in range(2) for p in scenes.evaluation_prompts(2)[i::2]]
    for name, mistakes in {"teacher": 0.05, "70": 0.15, "50": 0.3}.items():
        folder = run / "evaluate" / name
        for seed in seeds:
            (folder / "images" / f"seed-{seed}").mkdir(parents=True)
            for index, prompt in enumerate(prompts):
                rng = np.random.default_rng(100 * seed + index)
                shown = prompt if rng.random() > mistakes else prompts[index - 1]
                image = scenes.render(scenes.scene_of(shown, rng), rng).astype(float) + rng.normal(0, 9, (32, 32, 3))
                path = folder / "images" / f"seed-{seed}" / f"{index:04d}.png"
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
        (folder / "exam.json").write_text(json.dumps({"prompts": prompts, "scored": True, "seeds": list(seeds)}))


def write_events(run) -> None:
    seconds = {
        "samples": 41.2,
        "probe": 12.5,
        "intervals": 6.1,
        "select": 18.0,
        "depth": 212.4,
        "width": 75.3,
        "report": 2.0,
    }
    lines = [
        {"stage": s, "event": e, "seconds": n, "time": "2025-01-01T10:00:00+0000"}
        for s, n in seconds.items()
        for e in ("started", "finished")
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "rep')


def synthetic_run(run, *, seed: int = 0):
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text("teacher: {path: shapes}\n# <script>alert(1)</script>\ntargets: []\n")
    versions = {"torch": "2.13.0", "diffusers": "0.42.1"}
    environment = {"python": "3.11.9", "packages": versions, "threads": 2, "gpus": []}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "warnings": ["the score of <70> is uncertain"]}))
    write_findings(run, rng)
    write_losses(run, rng)
    write_images(run)
    write_events(run)
    for name, plan in PLANS.items():
        (run / "variants" / name).mkdir(parents=True)
        plan.save(run / "variants" / name / "plan.json")
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_report(synthetic_run(tmp_path_factory.mktemp("run") / "tiny")).read_text()


def test_the_page_needs_nothing_from_outside(page):
    assert "http" not in page
    assert "<script" not in page and "<link" not in page
    sources = re.findall(r'(?:src|href)="([^"]{1,30})', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)


def test_every_number_of_the_summary_is_on_the_page(page):
    table = re.findall(r"<tr><td>(.*?)</tr>", page)
    for row, expected in zip(table, ["10.2 M", "7.01 M", "5.02 M"], strict=False):
        assert expected in row
    for text in ("0.923", "0.871", "0.742", "21.3", "38.7", "0.183", "0.312", "5.6", "19.6", "0.041", "custom"):
        assert text in page
    assert f"{100 * 7_012_345 / 10_204_321:.1f} %" in page


def test_flops_are_on_the_page(page):
    assert "255 MFLOP" in page and "175 MFLOP" in page
    assert page.count("49.2 %") == 2, "of the parameters, and of the FLOPs"
    assert "MFLOP" in page.split("What was removed")[1], "of candidates, too"


def test_a_run_of_an_earlier_version_has_a_page(tmp_path):
    synthetic_run(tmp_path)
    for name, drop in (("summary.json", '"flops"'), ("select/measured.json", None)):
        rows = json.loads((tmp_path / name).read_text())
        if drop:
            for row in (rows["teacher"], *rows["variants"]):
                del row["flops"]
        else:
            rows = [{**row, "saves": row["saves"]["params"]} for row in rows]
        (tmp_path / name).write_text(json.dumps(rows))
    page = write_report(tmp_path).read_text()
    assert "MFLOP" not in page


def test_every_variant_operation_and_category_is_named(page):
    for name, plan in PLANS.items():
        assert f"<h3>{name}</h3>" in page
        for operation in plan.operations:
            assert f"<li>{operation}</li>" in page
    for category in scenes.CATEGORIES:
        assert category.replace("_", " ") in page


def test_a_heatmap_says_of_how_many_samples_it_is(page):
    whole = (
        "not all samples are in: transformer_blocks · image: the first 16 of 160; single_transformer_blocks · image:"
    )
    assert f"{whole} the first 16 of 160.</figcaption>" in page
    assert "text: the first" not in page


def test_it_says_what_else_the_calibration_set_finds(page):
    assert "found again 25%" in page
    row = "<td><code>transformer_blocks</code></td><td>the first half</td><td><small>[0,7]</small></td>"
    assert row in page and page.count("<td>all of it</td>") == len(DEPTHS)


def test_strips_show_each_block_once(page):
    assert page.count('<div class="block ') == 2 * sum(DEPTHS.values())
    removed = sum(i.removed for i in INTERVALS)
    assert page.count('<div class="block gone"') == 2 * removed


def test_figures_are_there_and_take_the_text_colour(page):
    assert page.count("<figure>") == 6
    assert "currentColor" in page and "#010203" not in page
    assert "unexplained share" in page and "chosen for 70, 50" in page


def test_images_are_marked_by_the_scorer(page):
    assert page.count('<span class="shot') == 14 * 3 * 3
    assert "✓</em>" in page and "✗</em>" in page


def test_recipe_is_escaped_and_stages_are_timed(page):
    assert "&lt;script&gt;" in page and "the score of &lt;70&gt; is uncertain" in page
    assert "3 min 32 s" in page and ">depth<" in page


def test_a_page_is_the_same_when_made_again(tmp_path):
    run = synthetic_run(tmp_path / "again")
    assert write_report(run).read_text() == write_report(run).read_text()


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("teacher: {path: shapes}\n")
    page = write_report(tmp_path).read_text()
    assert "not finished" in page and "<figure>" not in page


def test_absent_parts_are_left_out(tmp_path):
    run = synthetic_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    lost = ["intervals", "depth", "width", "finetune", "select", "summary.json", "probe", "variants", "evaluate"]
    counts = []
    for part in lost:
        (run / part).rename(tmp_path / "elsewhere" / part)
        counts.append(write_report(run).read_text().count("<figure>"))
    assert counts == [4, 4, 4, 3, 2, 1, 0, 0, 0]


def test_the_stream_that_decided_is_drawn(tmp_path):
    run = tmp_path / "run"
    synthetic_run(run)
    for part in ("evaluate", "select", "depth", "width", "probe"):
        (run / part).rename(tmp_path / part)
    settings = {"intervals": {"stream": "text"}, "width": {}}
    (run / "intervals" / "made_from.json").write_text(json.dumps({"settings": settings}))
    # Once as a heatmap's title, once as the differences'.
    assert write_report(run).read_text().count(">transformer_blocks · text</text>") == 2


def test_what_was_chosen_is_shown_however_many_were_measured(tmp_path):
    (tmp_path / "select").mkdir()
    (tmp_path / "recipe.yaml").write_text("{}")
    swaps = [FfnSwap(stack="blocks", block=n, streams=("image",)) for n in range(80)]
    rows = [candidate(swap, 0.001 * (n + 1), 1000, ["50"] if n == 79 else []) for n, swap in enumerate(swaps)]
    (tmp_path / "select" / "measured.json").write_text(json.dumps(rows))
    page = write_report(tmp_path).read_text()
    assert "blocks[79] ffn image" in page and "blocks[0] ffn image" in page and "blocks[60] ffn image" not in page


def test_a_chance_that_nobody_knows_is_a_dash(tmp_path):
    run = synthetic_run(tmp_path / "run")
    teacher = {**SUMMARY["teacher"], "chance": None}
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "teacher": teacher, "warnings": []}))
    assert "other prompts of their category score –." in write_report(run).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(PpclError, match=r"no run of ppcl"):
        write_report(tmp_path)


def test_the_curve_of_ranks_and_their_marks(tmp_path):
    run = synthetic_run(tmp_path / "light")
    (run / "modulation").mkdir()
    curve = {"1": 0.2, "2": 0.1, "4": 0.031, "3": 0.049}
    (run / "modulation/curve.json").write_text(json.dumps({"rank": 3, "curve": curve, "swaps": [], "covered": {}}))
    (run / "modulation/made_from.json").write_text(json.dumps({"settings": {"error": 0.05}}))
    low = ModulationSwap(stack="transformer_blocks", rank=3)
    plan = PLANS["50"].with_operations([*PLANS["50"].operations, low])
    (run / "select/targets.json").write_text(json.dumps({"light": plan.model_dump(mode="json")}))
    page = write_report(run).read_text()
    assert page.count("<figure>") == 7
    assert "rank 3: 0.049" in page and "at most 0.05" in page
    assert page.count('<i class="modulation">') == 1 + 6  # the key, and the blocks that are left
    assert "block 5 kept, linear: image FFN, modulation of rank 3" in page
    assert "transformer_blocks modulation of rank 3" in page
