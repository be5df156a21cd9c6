"""What users install is the wheel: it is built, unpacked elsewhere, and works with the sources out of sight."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = """
import importlib.resources, sys
from pathlib import Path
import ppcl_toolkit
place = Path(sys.argv[1])
assert Path(ppcl_toolkit.__file__).is_relative_to(place), ppcl_toolkit.__file__
from ppcl_toolkit import Plan, Recipe, compress, load_compressed
from ppcl_toolkit.adapter import available_adapters, load_adapter
from ppcl_toolkit.artifacts.pipeline import resolve
from ppcl_toolkit.recipe_files import shipped_recipes, shipped_text
assert load_adapter("flux").transformer == "FluxTransformer2DModel"
assert "flux" in available_adapters()
assert "tiny" in shipped_recipes()
assert Recipe.load("tiny").targets
assert shipped_text("slurm").startswith("#!")
assert "<html" in (importlib.resources.files("ppcl_toolkit.stages") / "report.html").read_text().lower()
assert (Path(resolve("shapes")) / "model_index.json").is_file()
assert Path(resolve("shapes")).is_relative_to(place)
for name, module in list(sys.modules.items()):
    origin = getattr(module, "__file__", None)
    if name.split(".")[0] in ("ppcl_toolkit", "adapters", "recipes") and origin:
        assert Path(origin).is_relative_to(place), (name, origin)
assert not {"adapters", "recipes"} & sys.modules.keys()
print("everything is there")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # Built from a copy of what git tracks or would track: a build leaves folders behind, and takes what it finds.
    sources = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[:2000]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    place = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return place


def elsewhere(place, code, *arguments):
    """Run code with the installed wheel first, and without the editable installation's import hook."""
    head = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(getattr(f, '__module__', f)).lower()]\n"
        f"sys.path.insert(0, {str(place)!r})\n"
    )
    command = [sys.executable, "-I", "-c", head + code, *arguments]
    return subprocess.run(command, cwd=place.parent, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_file_that_is_no_test(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, home in (("adapters", "ppcl_toolkit/adapters"), ("recipes", "ppcl_toolkit/recipes")):
        expected = {f"{home}/{path.name}" for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".yaml")}
        assert expected <= names
    sources = ROOT / "ppcl_toolkit"
    expected = {path.relative_to(ROOT).as_posix() for path in sources.rglob("*.py")}
    expected |= {
        path.relative_to(ROOT).as_posix() for path in (sources / "shapes" / "teacher").rglob("*") if path.is_file()
    }
    assert expected | {"ppcl_toolkit/stages/report.html"} <= names
    assert "ppcl_toolkit/shapes/teacher/transformer/diffusion_pytorch_model.safetensors" in names


def test_the_wheel_installs_one_package_and_one_command(wheel):
    archive = zipfile.ZipFile(wheel)
    tops = {name.split("/")[0] for name in archive.namelist()}
    # A package called `adapters` would overwrite another project's.
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ppcl_toolkit"}
    (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "ppcl = ppcl_toolkit.cli:main" in archive.read(entries).decode()
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_embedded_teacher_is_small(wheel):
    assert wheel.stat().st_size < 30e6


def test_the_installed_wheel_works_with_the_sources_out_of_sight(installed):
    done = elsewhere(installed, CHECKS, str(installed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "everything is there"


def test_the_command_line_of_the_wheel_answers(installed):
    code = (
        "import sys\nfrom ppcl_toolkit.cli import main\nsys.argv[:] = ['ppcl', 'recipes', 'list']\nsys.exit(main())\n"
    )
    done = elsewhere(installed, code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny" in done.stdout
