"""The commands of adapters/README.md, in their order, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import parts
import torch
from diffusers import BriaPipeline, BriaTransformer2DModel

PAGE = Path(__file__).parents[1] / "adapters" / "README.md"


def teacher(folder):
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    pipeline = parts.finished(
        BriaPipeline,
        transformer=parts.randomize(transformer),
        vae=parts.vae(4),
        text_encoder=parts.t5_encoder(),
        tokenizer=parts.t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)


def test_a_family_from_zero(tmp_path):
    teacher(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\ntwo green ones\nnothing\n")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert "transformer_blocks" in (tmp_path / "bria.py").read_text()
    whole = sum(p.numel() for p in BriaPipeline.from_pretrained(tmp_path / "teacher").transformer.parameters())
    assert int(re.search(r"(\d+) parameters", said)[1]) <= 0.8 * whole
    written = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_bria.py"]
    done = subprocess.run(written, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
