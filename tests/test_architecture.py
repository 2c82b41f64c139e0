"""The house: who may import whom, and what every shipped file must be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "segdeconv"

# Imports go leftwards only; what stands between two bars does not import its neighbours.
ORDER = (
    "errors | system, switches | config, classes | models, losses, optimization, drawing | summary | data | "
    "checkpoints | inference | evaluation, export | analysis | training | serving | train | experiments | cli"
)
ENTRIES = 24  # of the package at most, so that a stranger who lists it sees the system

# The only files that may import a library, at the top or inside a function.
ONLY = {
    "argparse": {"cli"},
    "filelock": {"system.files"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "pytorch_lightning": {"training"},
    "lightning_fabric": set(),
    "albumentations": {"data.augmentation"},
    "jinja2": {"drawing.html"},
    "torchvision": {"models.vgg"},
    "triton": {"switches.triton_kernels", "switches.fused_triton"},
    "lightning": set(),
    "unittest": set(),
}


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Dotted names imported by a file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(name: str) -> set[str]:
    """The modules of the package that a module imports; of `from package import name` the package itself."""
    inner = {full.removeprefix("segdeconv.") for full in imported(MODULES[name]) if full.startswith("segdeconv.")}
    return {module for module in inner if module in MODULES} - {name}


def test_imports_go_leftwards_only():
    places = {name: place for place, names in enumerate(ORDER.split(" | ")) for name in names.split(", ")}
    rooms = {name.partition(".")[0] for name in MODULES} - {"", "__main__"}
    assert rooms == set(places)
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in ours(name)
        if name.partition(".")[0] not in (other.partition(".")[0], "", "__main__")
        and places[other.partition(".")[0]] >= places[name.partition(".")[0]]
    ]
    assert wrong == []


def test_no_circle_between_files():
    arrows = {}
    for name in MODULES:
        others = ours(name)
        # A package's own files come before it; what it hands on is imported through it from outside alone.
        inside = {other for other in others if name.startswith(f"{other}.")}
        arrows[name] = others - inside
    del arrows[""]  # hands on `load`, lazily
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_stranger_who_lists_the_package_sees_the_system():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ENTRIES
    for path in PACKAGE.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert "may import" in docstring.lower(), path


def test_experiments_are_imported_by_scripts_alone():
    users = {name for name in MODULES if any(other.startswith("experiments") for other in ours(name))}
    assert not {name for name in users if not name.startswith("experiments")}


@pytest.mark.parametrize("library", sorted(ONLY))
def test_a_library_is_imported_only_where_it_belongs(library):
    users = {
        name
        for name, path in MODULES.items()
        if any(full == library or full.startswith(f"{library}.") for full in imported(path))
    }
    assert {name for name in users if not {name, name.partition(".")[0]} & ONLY[library]} == set()


def test_importing_everything_changes_nothing_process_wide():
    """No connection, no handler, no limit of Pillow's, no path; of the environment only what albumentations needs."""
    probe = """
import os, signal, socket, sys
def refuse(*_): raise AssertionError("a connection")
socket.socket.connect = refuse
from PIL import Image
def state(): return (
    Image.MAX_IMAGE_PIXELS, list(sys.path), [signal.getsignal(number) for number in (2, 15)],
    {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"})
import albumentations, pytorch_lightning, torchvision
before = state()
"""
    imports = "\n".join(f"import segdeconv.{name}" for name in MODULES if name)
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'{probe}{imports}\n"
         "assert state() == before"], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_networks_cost_no_import_of_the_trainer():
    probe = "import sys; from segdeconv.models import SegNet; print([n for n in sys.modules if 'lightning' in n][:1])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_network_is_prepared_for_inference_in_one_place():
    makers = {name for name, path in MODULES.items() if "fold_norms(" in path.read_text()}
    assert makers == {"models.layers", "inference.network", "export.export"}  # the definition, use, files for others


def test_no_file_name_says_nothing():
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common", "misc")]


def test_num_classes_stands_in_no_config():
    assert not [path for path in (ROOT / "configs").rglob("*.yaml") if "num_classes" in path.read_text()]
