"""The installed package: one console command that works in any folder, and exactly the files that it needs."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from fresh_commands import child_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "demo", "runs", ".*")
SLIM = ("model.stages=[[4],[8]]", "trainer.max_epochs=1", "dataset.num_train=8", "dataset.num_val=4")


def run(*words, cwd, code=0, **environment):
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def segdeconv(*words, cwd, code=0):
    return run(sys.executable, "-m", "segdeconv", *words, cwd=cwd, code=code)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_lists_every_script_with_its_first_line(tmp_path, words):
    shown = segdeconv(*words, cwd=tmp_path).stdout
    for script in SCRIPTS:
        first = ast.get_docstring(ast.parse(script.read_text())).splitlines()[0]
        assert [line.split(maxsplit=1) for line in shown.splitlines() if first in line] == [[script.stem, first]]


def test_a_misspelt_command_is_one_line(tmp_path):
    done = segdeconv("trian", cwd=tmp_path, code=2)
    assert done.stderr.startswith("segdeconv: error: unknown command 'trian' - did you mean 'train'? Available: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_command_calls_itself_as_it_was_typed(tmp_path):
    assert "see segdeconv evaluate --help" in segdeconv("evaluate", cwd=tmp_path, code=2).stderr
    assert segdeconv("help", "predict", cwd=tmp_path).stdout.startswith("usage: segdeconv predict ")
    for name in ("train", "inspect_data"):
        shown = segdeconv(name, "--help", cwd=tmp_path).stdout
        assert f"    segdeconv {name} [dataset=NAME]" in shown
        assert "python scripts" not in shown
    script = run(sys.executable, ROOT / "scripts" / "evaluate.py", cwd=tmp_path, code=2)
    assert "see python scripts/evaluate.py --help" in script.stderr


def test_the_version_is_that_of_the_package(tmp_path):
    metadata = {}
    exec((ROOT / "segdeconv" / "__init__.py").read_text(), metadata)
    assert segdeconv("--version", cwd=tmp_path).stdout == f"segdeconv {metadata['__version__']}\n"


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "segdeconv").rglob("*.py")}
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(packed["packages"]) == {folder.replace("/", ".") for folder in folders} | {
        "segdeconv.scripts",
        "segdeconv.configs",
    }


def shipped():
    """Return the paths of the files expected in a wheel: the package, and the scripts and configs inside it."""
    sources = {"segdeconv": ROOT / "segdeconv", "segdeconv/scripts": ROOT / "scripts"}
    files = {f"{folder}/{path.relative_to(base).as_posix()}" for folder, base in sources.items() for path in
             base.rglob("*.py")}  # fmt: skip
    files |= {f"segdeconv/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in
              (ROOT / "configs").rglob("*.yaml")}  # fmt: skip
    patterns = (
        "py.typed",
        "checkpoints/weights/*.[sj]*",
        "data/datasets/*.sha256",
        "drawing/pages/*",
        "experiments/study/tables/*.yaml",
        "serving/*.[cj]*s",
        "serving/*.html",
        "serving/label/*.[cj]*s",
        "serving/label/*.html",
    )
    return files | {
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / "segdeconv").glob(pattern)
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel built from the sources and one from the source archive; built offline from a copy without old files."""
    place = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, place / "sources", ignore=LEFT_OUT)
    build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    from_sources = place / "wheel" / run(
        sys.executable, "-c", build, "build_wheel", place / "wheel", cwd=place / "sources"
    ).stdout.splitlines()[-1]  # fmt: skip
    name = run(sys.executable, "-c", build, "build_sdist", place, cwd=place / "sources").stdout.splitlines()[-1]
    with tarfile.open(place / name) as archive:
        archive.extractall(place, filter="data")
    unpacked = place / name.removesuffix(".tar.gz")
    from_archive = place / "again" / run(
        sys.executable, "-c", build, "build_wheel", place / "again", cwd=unpacked
    ).stdout.splitlines()[-1]  # fmt: skip
    return from_sources, from_archive


@pytest.mark.slow
def test_the_wheel_contains_exactly_the_package_its_commands_and_their_configs(built):
    contents = []
    for wheel in built:
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        assert set(files) == shipped()
        contents.append(files)
    assert contents[0] == contents[1]
    for script in SCRIPTS:
        assert contents[0][f"segdeconv/scripts/{script.name}"] == script.read_bytes()


def environment(place, *install):
    """Create an environment with the libraries of this one, run `pip install` in it and return its scripts folder."""
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place.parent)
    python = Path(sysconfig.get_path("scripts", "venv", vars={"base": str(place)})) / Path(sys.executable).name
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).stdout.strip()
    # As a plain folder at the end of sys.path: its .pth files, one of which may point to this clone, are not read. It
    # also provides pip and setuptools.
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(python, "-m", "pip", "install", *options, *install, cwd=place)
    return python.parent


def import_path(commands, cwd):
    """Return the file that `import segdeconv` loads in an environment."""
    return Path(run(commands / "python", "-c", "import segdeconv; print(segdeconv.__file__)", cwd=cwd).stdout.strip())


@pytest.mark.slow
def test_an_installed_package_trains_evaluates_and_predicts_in_an_empty_folder(built, tmp_path_factory, tmp_path):
    place = tmp_path_factory.mktemp("environment")
    commands = environment(place / "new", built[0])
    assert import_path(commands, tmp_path).is_relative_to(place)
    program = commands / "segdeconv"
    listed = [line.split()[0] for line in run(program, cwd=tmp_path).stdout.splitlines() if line.startswith("    ")]
    assert listed == [script.stem for script in SCRIPTS]
    shown = run(program, "train", *SLIM, "dataset.batch_size=2", "dataset.num_workers=1", cwd=tmp_path).stdout
    (run_folder,) = tmp_path.glob("runs/shapes-segnet/*")
    best = run_folder.relative_to(tmp_path) / "best.ckpt"
    assert f"segdeconv predict {best} IMAGE" in shown
    assert json.loads((run_folder / "report.json").read_text())["command"].startswith("segdeconv train ")
    evaluate = ("evaluate", best, "--out", "scores", "--pictures", "pictures")
    run(program, *evaluate, cwd=tmp_path)
    after, before = (json.loads((place / "report.json").read_text()) for place in (tmp_path / "scores", run_folder))
    assert after["miou"] == pytest.approx(before["miou"], abs=1e-6)
    assert after["command"] == "segdeconv " + " ".join(map(str, evaluate))
    run(program, "predict", best, "pictures", "--out", "labelled", cwd=tmp_path)
    assert len(list((tmp_path / "labelled").glob("*_overlay.png"))) == 4
    run(commands / "python", "-m", "segdeconv", "inspect_data", *SLIM[2:], cwd=tmp_path)
    sweep = ("train", "--multirun", "seed=1,2", *SLIM, "dataset.batch_size=2", "hydra.sweep.dir=sweep")
    run(program, *sweep, cwd=tmp_path)
    assert len(list(tmp_path.glob("sweep/*/report.json"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs",
        "scores",
        "pictures",
        "labelled",
        "sweep",
        "inspection",
    }


@pytest.mark.slow
def test_an_editable_install_has_the_same_commands(tmp_path):
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    shutil.copytree(ROOT, clone, ignore=LEFT_OUT)
    elsewhere.mkdir()
    commands = environment(tmp_path / "new", "--editable", clone)
    assert import_path(commands, elsewhere).is_relative_to(clone)
    done = run(commands / "segdeconv", "train", "model=segnt", cwd=elsewhere, code=2)
    assert "unknown model 'segnt' - did you mean 'segnet'?" in done.stderr
    assert "evaluate" in run(commands / "segdeconv", cwd=elsewhere).stdout


SPAWNS = """
import multiprocessing, os
from PIL import Image
from segdeconv.cli.command import run_command
from segdeconv.system import KEEP_FREED

def show():
    print(Image.MAX_IMAGE_PIXELS, os.environ[KEEP_FREED], os.environ["OPENCV_FFMPEG_LOGLEVEL"], flush=True)

def main():
    show()
    process = multiprocessing.get_context("spawn").Process(target=show)
    process.start()
    process.join()

if __name__ == "__main__":
    run_command(main)
"""


def test_a_command_and_its_spawned_processes_have_the_process_settings(tmp_path):
    (tmp_path / "script.py").write_text(SPAWNS)
    names = ("SEGDECONV_KEEP_FREED_MEMORY", "OPENCV_FFMPEG_LOGLEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, str(tmp_path / "script.py")]
    environment["PYTHONPATH"] = child_environment(ROOT)["PYTHONPATH"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["None 1 -8", "None 1 -8"]
