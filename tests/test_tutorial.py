"""The commands of adapters/README.md, in their order, as they stand there."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pictures
from diffusers import BriaPipeline

PAGE = Path(__file__).parents[1] / "adapters" / "README.md"


def test_a_family_from_zero(tmp_path, monkeypatch):
    pictures.bria().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\ntwo green ones\nnothing\n")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert "transformer_blocks" in (tmp_path / "bria.py").read_text()
    whole = sum(p.numel() for p in BriaPipeline.from_pretrained(tmp_path / "teacher").transformer.parameters())
    assert int(re.search(r"(\d+) parameters", said)[1]) <= 0.8 * whole
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path("test_bria.py")["test_bria"]()
