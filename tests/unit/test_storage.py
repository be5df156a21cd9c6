"""What is written is read back bit by bit, and a damaged file is one sentence."""

import pytest
import torch

from ppcl_toolkit.artifacts import storage
from ppcl_toolkit.artifacts.storage import Bank, load_tree, save_tree
from ppcl_toolkit.errors import PpclError


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


def test_a_tree_is_read_as_it_was_written(tmp_path):
    x = torch.randn(3, 4)
    tree = {
        "nested": {"tuple": (x, (1, 2.5)), "list": [True, None, "words"], "empty": [], "none": {}},
        "bf16": x.bfloat16(),
        "view": x.T[1:],
        "expanded": x[:1].expand(5, 4),
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "no rows": torch.zeros(0, 4),
    }
    save_tree(tmp_path / "tree.safetensors", tree)
    assert same(load_tree(tmp_path / "tree.safetensors"), tree)
    assert [path.name for path in tmp_path.iterdir()] == ["tree.safetensors"]


def test_what_several_share_is_written_once(tmp_path):
    shared = torch.randn(1000)
    save_tree(tmp_path / "once", {"a": shared})
    save_tree(tmp_path / "twice", [{"ids": shared, "more": (shared,)} for _ in range(3)])
    found = load_tree(tmp_path / "twice")
    assert same(found, [{"ids": shared, "more": (shared,)}] * 3)
    assert found[0]["ids"] is found[2]["more"][0]
    sizes = [(tmp_path / name).stat().st_size for name in ("once", "twice")]
    assert sizes[1] < sizes[0] + 1000


def test_rows_of_a_list_are_read_without_the_others(tmp_path, monkeypatch):
    rows = [{"x": torch.full((2,), float(i)), "shared": "words"} for i in range(5)]
    save_tree(tmp_path / "tree", rows)
    read = []
    opened = storage.safe_open

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = opened(*args, **kwargs)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def metadata(self):
            return self.file.metadata()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(storage, "safe_open", Watched)
    assert same(load_tree(tmp_path / "tree", slice(2, 4)), rows[2:4])
    assert read == ["/2/x", "/3/x"]
    assert same(load_tree(tmp_path / "tree", slice(None)), rows)


def test_tied_weights_and_overlapping_views_are_written(tmp_path):
    x = torch.randn(4, 4)
    tied = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(tied, tied)
    save_tree(tmp_path / "tree", {"state": dict(model.state_dict()), "views": [x[:3], x[1:]]})
    assert same(load_tree(tmp_path / "tree"), {"state": dict(model.state_dict()), "views": [x[:3], x[1:]]})


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "tree"
    save_tree(path, {"a": torch.ones(2)})
    with pytest.raises(AssertionError, match="a set on disk"):
        save_tree(path, {"a": torch.zeros(2), "b": {1, 2}})
    assert torch.equal(load_tree(path)["a"], torch.ones(2))


@pytest.mark.parametrize("damage", ["cut", "header", "foreign", "empty", "missing"])
def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path, damage):
    path = tmp_path / "tree.safetensors"
    save_tree(path, {"a": torch.randn(100)})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "header":
        path.write_bytes(path.read_bytes()[:8] + b"\xff" * 20 + path.read_bytes()[28:])
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(PpclError, match=r"tree\.safetensors is damaged or not a file of this run") as caught:
        load_tree(path)
    assert "\n" not in str(caught.value)


def test_a_bank_reads_the_blocks_of_its_folders(tmp_path):
    for name in ("depth", "width"):
        (tmp_path / name).mkdir()
        save_tree(tmp_path / name / f"blocks.0-1.{name}.safetensors", {"weight": torch.full((2,), float(len(name)))})
    (tmp_path / "depth" / "state-0.safetensors.tmp").touch()
    (tmp_path / "depth" / ".blocks.2-3.safetensors.partial").touch()
    bank = Bank(tmp_path / "depth", tmp_path / "width")
    assert sorted(bank) == ["blocks.0-1.depth", "blocks.0-1.width"]
    assert "blocks.0-1.depth" in bank
    assert "blocks.2-3" not in bank
    assert torch.equal(bank["blocks.0-1.width"]["weight"], torch.full((2,), 5.0))
    with pytest.raises(KeyError):
        bank["blocks.9-9"]
