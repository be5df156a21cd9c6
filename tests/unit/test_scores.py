"""Scores: every scorer's output is read as its repository writes it, and the table is the paper's."""

import json

import pytest

from ppcl_toolkit.benchmarks import scores
from ppcl_toolkit.benchmarks.scores import COLUMNS, Score, tabulate
from ppcl_toolkit.errors import PpclError

# Table 1 of the paper, Qwen-Image: the nine benchmarks and R; columns that are means of parts hold the mean in each.
PAPER = {
    "Qwen-Image": ((88.9, 0.870, 0.943, 0.946, 0.539, 0.548, 0.709, 0.532, 82.47), 0.0),
    "TinyFusion": ((80.7, 0.739, 0.859, 0.857, 0.500, 0.498, 0.689, 0.464, 78.99), 8.75),
    "HierarchicalPrune": ((83.3, 0.766, 0.884, 0.881, 0.509, 0.496, 0.706, 0.487, 79.94), 6.49),
    "PPCL(14B)": ((87.9, 0.847, 0.929, 0.946, 0.536, 0.538, 0.750, 0.524, 82.15), 0.42),
    "PPCL(12B)": ((83.6, 0.801, 0.893, 0.917, 0.517, 0.531, 0.733, 0.529, 81.94), 3.03),
    "PPCL(10B)": ((81.7, 0.784, 0.871, 0.885, 0.485, 0.501, 0.701, 0.499, 79.24), 6.88),
    "PPCL(Fine-tuning)": ((86.7, 0.828, 0.902, 0.931, 0.499, 0.519, 0.715, 0.515, 81.33), 3.29),
}


def filled(model, values):
    """Scores of a model by column; each of a column's parts has the value."""
    named = zip(COLUMNS.items(), values, strict=True)
    return [Score(model=model, column=c, part=p, value=v) for (c, parts), v in named for p in parts or ("",)]


def test_the_papers_table_comes_out():
    rows, notes = tabulate([score for model, (values, _) in PAPER.items() for score in filled(model, values)])
    assert not notes
    assert [row.model for row in rows] == list(PAPER)
    for row, (values, drop) in zip(rows, PAPER.values(), strict=True):
        assert tuple(row.values.values()) == pytest.approx(values)
        assert row.drop == pytest.approx(drop, abs=0.01)  # from rounded scores
    # Tables 3 and 4: R of one benchmark.
    assert rows[-1].drops["DPG"] == pytest.approx(2.47, abs=0.01)
    assert rows[-1].drops["GenEval"] == pytest.approx(4.82, abs=0.01)
    assert rows[3].drops["OneIG ZH"] == pytest.approx(1.82, abs=0.01)


def test_columns_that_are_means_of_parts():
    # Tables 4 and 6: the published parts of the base model have the published means.
    oneig = dict(zip(COLUMNS["OneIG EN"], (0.882, 0.891, 0.306, 0.418, 0.197), strict=True))
    unidet = {"spatial": 0.428, "3d_spatial": 0.453, "numeracy": 0.716}
    given = [Score(model="base", column="OneIG EN", part=part, value=value) for part, value in oneig.items()]
    given += [Score(model="base", column="UniDet", part=part, value=value) for part, value in unidet.items()]
    (row,), _ = tabulate(given)
    assert row.values == pytest.approx({"OneIG EN": 0.539, "UniDet": 0.532}, abs=6e-4)


def test_what_does_not_compare_is_left_out_and_said():
    def coherent(model, *parts):
        return [Score(model=model, column="S-CoT", part=part, value=80.0) for part in parts]

    some = [Score(model="student", column="UniDet", part="spatial", value=0.5)]
    rows, notes = tabulate(
        [
            *coherent("teacher", "color", "shape"),
            *coherent("student", "color"),
            *coherent("other", "color", "shape", "complex"),
            *some,
        ]
    )
    assert notes == [
        "student: UniDet lacks 3d_spatial, numeracy",
        "student: S-CoT lacks shape",
        "other: S-CoT also has complex, and the reference has not",
    ]
    assert rows[0].drop == 0
    assert rows[1].drop is None
    with pytest.raises(PpclError, match="S-CoT color of teacher is given twice"):
        tabulate(coherent("teacher", "color", "color"))


def test_a_benchmark_without_the_reference_does_not_count():
    given = [Score(model="teacher", column="DPG", value=80.0), Score(model="student", column="DPG", value=60.0)]
    rows, _ = tabulate([*given, Score(model="student", column="GenEval", value=0.5)])
    assert rows[1].drops == {"DPG": pytest.approx(25)}
    assert scores.lay_out(rows) == [
        ["model", "DPG", "GenEval", "R %"],
        ["teacher", "80 (0.00)", "-", "0.00"],
        ["student", "60 (25.00)", "0.5 (-)", "25.00"],
    ]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lines(*values):
    return "\n".join(map(json.dumps, values)) + "\n"


def test_geneval(tmp_path):
    results = [
        {"filename": f"out/geneval/small/{i:05}/samples/0000.png", "tag": tag, "correct": correct, "reason": ""}
        for i, (tag, correct) in enumerate([("colors", True), ("colors", False), ("colors", False), ("position", True)])
    ]
    (score,) = scores.read_geneval(write(tmp_path / "results.jsonl", lines(*results)))
    assert score == Score(model="small", column="GenEval", value=pytest.approx((1 / 3 + 1) / 2))


def test_dpg(tmp_path):
    text = """out/dpg/small/7.png, 1.0, 0.5, 1.0, 1.0, 0.875
Model: small
L1 category scores:
\tentity: 91.6
L2 category scores:
\tentity - whole: 92.5
Image path: out/dpg/small
Save results to: out/dpg/small/dpg-bench_results.txt
DPG-Bench score: 88.91234
"""
    (score,) = scores.read_dpg(write(tmp_path / "dpg-bench_results.txt", text))
    assert score == Score(model="small", column="DPG", value=88.91234)


@pytest.mark.parametrize(("truth", "column"), [("fresh brews", "LongText EN"), ("每日新鲜烘焙", "LongText ZH")])
def test_longtext(tmp_path, truth, column):
    raw = {"image": "out/longtext/en/small/0000_1.png", "prompt": "p", "ocr_gt": truth, "ocr_results": "\u2028"}
    counts = [{"match_word_count": 9, "gt_word_count": 10}, {"match_word_count": 1, "gt_word_count": 2}]
    text = "\n".join(json.dumps({**raw, **count}, ensure_ascii=False) for count in counts)
    (score,) = scores.read_longtext(write(tmp_path / "results.jsonl", text))
    assert score == Score(model="small", column=column, value=pytest.approx(10 / 12))
    with pytest.raises(PpclError, match="run summary_scores.py"):
        scores.read_longtext(write(tmp_path / "results.jsonl", lines(raw)))


def test_oneig(tmp_path):
    text = ",ED,CR,WAC,text score\nbase,10.5,0.4,0.9,0.891\nsmall,12.5,0.3,0.8,0.86\n"
    found = scores.read_oneig(write(tmp_path / "text_score_EN_2025-06-10_11-12-13.csv", text))
    assert [(score.model, score.part, score.value) for score in found] == [
        ("base", "text", 0.891),
        ("small", "text", 0.86),
    ]
    assert found[0].column == "OneIG EN"
    text = ",anime,human,total average\nsmall,0.1,0.2,0.13\n"
    (score,) = scores.read_oneig(write(tmp_path / "diversity_score_ZH_now.csv", text))
    assert score == Score(model="small", column="OneIG ZH", part="diversity", value=0.13)
    assert scores.read_oneig(write(tmp_path / "text_prompt_score_EN_now.csv", ",small\n000,1\n")) is None
    assert scores.read_oneig(write(tmp_path / "style_style_score_EN_now.csv", ",baroque\nsmall,1\n")) is None
    with pytest.raises(PpclError, match="has no 'style' of each model"):
        scores.read_oneig(write(tmp_path / "style_score_EN_now.csv", ",style\nsmall,\n"))


@pytest.mark.parametrize(
    ("place", "column", "part"),
    [
        ("color/small/annotation_blip", "B-VQA", "color"),
        ("spatial/small/labels/annotation_obj_detection_2d", "UniDet", "spatial"),
        ("3d_spatial/small/labels/annotation_obj_detection_3d", "UniDet", "3d_spatial"),
        ("numeracy/small/annotation_num", "UniDet", "numeracy"),
        ("complex/small/sharegpt4v", "S-CoT", "complex"),
    ],
)
def test_compbench(tmp_path, place, column, part):
    answers = json.dumps([{"question_id": 0, "answer": "0.6900"}, {"question_id": 1, "answer": 0.71}])
    (score,) = scores.read_compbench(write(tmp_path / place / "vqa_result.json", answers))
    assert score == Score(model="small", column=column, part=part, value=pytest.approx(0.7))


def test_compbench_elsewhere(tmp_path):
    for place, says in (
        ("color/small/annotation_clip", "no scores of annotation_clip"),
        ("annotation_blip", "expected"),
    ):
        with pytest.raises(PpclError, match=says):
            scores.read_compbench(write(tmp_path / place / "vqa_result.json", "[]"))
    with pytest.raises(PpclError, match="is no list of answers"):
        scores.read_compbench(write(tmp_path / "color/small/annotation_blip/vqa_result.json", "[]"))
