"""Suites: every benchmark's prompt file is read as its repository has it, and others are refused."""

import json

import pytest

from ppcl_toolkit.benchmarks.suites import SUITES, find_suite, read_scores
from ppcl_toolkit.errors import PpclError

METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
]
FILES = {
    "geneval": ("evaluation_metadata.jsonl", "\n".join(map(json.dumps, METADATA)) + "\n"),
    "dpg": (
        "dpg_bench.csv",
        "item_id,text,proposition_id\npartiprompts0,A cat on a mat,1\npartiprompts0,A cat on a mat,2\n7,A dog,1\n",
    ),
    "longtext": ("text_prompts.jsonl", '{"prompt": "a sign: A\u2028B", "text": ["A"], "prompt_id": 12}\n'),
    "oneig": (
        "OneIG-Bench.csv",
        'category,id,prompt_en,class\nAnime_Stylization,000,"a girl,\n smiling",None\nKnowledge_Reasoning,003,why,\n',
    ),
    "t2i-compbench": ("color_val.txt", "a green bench and a blue bowl\r\nThe mat was red.\textra\r\n"),
}
PLACES = {
    "geneval": ["tiny/00000/samples/0000.png", "tiny/00001/samples/0000.png"],
    "dpg": ["tiny/partiprompts0.png", "tiny/7.png"],
    "longtext": ["tiny/0012_1.png"],
    "oneig": ["anime/tiny/000.webp", "reasoning/tiny/003.webp"],
    "t2i-compbench": [
        "tiny/samples/a green bench and a blue bowl_000000.png",
        "tiny/samples/The mat was red._000010.png",
    ],
}
PARTS = {"geneval": "", "dpg": "", "longtext": "en", "oneig": "en", "t2i-compbench": "color"}


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", SUITES)
def test_prompts_and_the_places_of_their_images(name, tmp_path):
    suite = find_suite(name)
    part, prompts = suite.read(write(tmp_path, *FILES[name]))
    assert part == PARTS[name]
    assert [suite.place(prompt, 0, "tiny") for prompt in prompts] == PLACES[name]
    every = {suite.place(prompt, number, "tiny") for prompt in prompts for number in range(suite.images)}
    assert len(every) == len(prompts) * (1 if suite.grid else suite.images)


def test_geneval_keeps_the_line_beside_the_images(tmp_path):
    suite = find_suite("geneval")
    _, prompts = suite.read(write(tmp_path, *FILES["geneval"]))
    assert json.loads(prompts[1].metadata) == METADATA[1]
    assert suite.metadata(prompts[1], "tiny") == "tiny/00001/metadata.jsonl"


def test_dpg_reads_a_folder_of_prompts(tmp_path):
    write(tmp_path, "12.txt", "A dog.\n")
    write(tmp_path, "COCOval2014000000005529.txt", "A cat.")
    _, prompts = find_suite("dpg").read(tmp_path)
    assert [(prompt.name, prompt.text) for prompt in prompts] == [
        ("12", "A dog."),
        ("COCOval2014000000005529", "A cat."),
    ]


def test_chinese_prompts_are_another_part(tmp_path):
    longtext = write(tmp_path, "a.jsonl", '{"prompt": "广告牌上写着“每日”", "prompt_id": 0}\n')
    assert find_suite("longtext").read(longtext)[0] == "zh"
    oneig = write(tmp_path, "a.csv", "category,id,prompt_cn,class\nMultilingualism,004,女孩,\n")
    part, prompts = find_suite("oneig").read(oneig)
    assert (part, prompts[0].group, prompts[0].text) == ("zh", "multilingualism", "女孩")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("geneval", "{}\n", "line 1: expected an object with prompt, tag"),
        ("geneval", '{"prompt": "a", "tag": "b"}\n{"prompt"\n', "line 2 is not JSON"),
        ("dpg", "id,prompt\n1,a\n", "has no column item_id, text"),
        ("longtext", '{"prompt": "a", "prompt_id": "first"}\n', "prompt_id 'first' is no number"),
        ("oneig", "category,id,prompt_en\nPlants,000,a\n", "the categories are Anime_Stylization"),
        ("oneig", "category,id,text\nPortrait,000,a\n", "prompt_en or prompt_cn is missing"),
        ("t2i-compbench", "a cat/dog\n", "cannot name a file"),
        ("t2i-compbench", f"{'long ' * 60}\n", "cannot name a file"),
    ],
)
def test_other_files_are_refused(name, text, says, tmp_path):
    with pytest.raises(PpclError, match=says):
        find_suite(name).read(write(tmp_path, "prompts", text))


def test_missing_files_and_unknown_suites(tmp_path):
    for suite in SUITES.values():
        with pytest.raises(PpclError, match="cannot be read"):
            suite.read(tmp_path / "nowhere")
    with pytest.raises(PpclError, match="there are geneval, dpg, longtext, oneig, t2i-compbench"):
        find_suite("hps")


def test_scores_are_told_apart_by_their_files(tmp_path):
    dpg = write(tmp_path, "dpg-bench_1_results.txt", "Model: teacher\nDPG-Bench score: 88.9\n")
    nameless = write(tmp_path, "nameless.txt", "Model: \nDPG-Bench score: 81.7\n")
    assert [score.model for score in read_scores([str(dpg), f"student={nameless}"])] == ["teacher", "student"]
    with pytest.raises(PpclError, match=f"give MODEL={nameless}"):
        read_scores([str(nameless)])
    both = write(tmp_path, "style_score_EN_now.csv", ",style\nteacher,0.4\nstudent,0.3\n")
    with pytest.raises(PpclError, match="the file scores 2 models and names them itself"):
        read_scores([f"student={both}"])
    with pytest.raises(PpclError, match="is not what a scorer of geneval"):
        read_scores([str(write(tmp_path, "notes.txt", "all good"))])
    with pytest.raises(PpclError, match="is no file"):
        read_scores([str(tmp_path / "nowhere.txt")])
