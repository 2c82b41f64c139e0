"""The architecture: which package may import which, and rules for all shipped files."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "segdeconv"

# A package may only import packages to its left, and none in its own group between two bars.
ORDER = (
    "errors | system, switches | config, classes | models, losses, optimization, drawing | summary | data | "
    "checkpoints | inference | evaluation, export | analysis | training | serving | train | experiments | cli"
)
# Imports to the right, inside the methods that they serve: a network loads, saves and shares itself.
UPWARD = {("models.base", "checkpoints.pretrained")}
MAX_ENTRIES = 24  # in the package folder, so that its listing shows the structure at a glance

# The only packages or modules that may import a library, at the top or inside a function.
ALLOWED_IMPORTERS = {
    "argparse": {"cli"},
    "filelock": {"system.files"},
    "hydra": {"config", "cli.overrides", "cli.completion", "experiments.sweeps", "experiments.optuna_sweeper"},
    "omegaconf": {"cli.overrides"},
    "optuna": {"experiments.optuna_sweeper"},
    "pytorch_lightning": {"training"},
    "lightning_fabric": set(),
    "albumentations": {"data.augmentation"},
    "jinja2": {"drawing.html"},
    "torchvision": {"models.vgg", "experiments.benchmarks.many"},
    "starlette": {"serving.server", "serving.local_server", "serving.label.server"},
    "uvicorn": {"serving.local_server", "serving.connection"},
    "h11": {"serving.connection"},
    "huggingface_hub": {"checkpoints.hub"},
    "obstore": {"data.files.object_folder", "data.files.object_storage"},
    "rasterio": {"data.files.geo"},
    "pyogrio": {"inference.vectors"},
    "pyarrow": {"inference.tables"},
    "ray": {"inference.distributed"},
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


@functools.cache
def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(name: str) -> set[str]:
    """Return the modules of segdeconv that a module imports; `from package import name` counts as the package."""
    inner = {full.removeprefix("segdeconv.") for full in imported(MODULES[name]) if full.startswith("segdeconv.")}
    return {module for module in inner if module in MODULES} - {name}


def test_packages_import_only_packages_to_their_left():
    position = {name: index for index, names in enumerate(ORDER.split(" | ")) for name in names.split(", ")}
    packages = {name.partition(".")[0] for name in MODULES} - {"", "__main__"}
    assert packages == set(position)
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported_modules(name)
        if name.partition(".")[0] not in (other.partition(".")[0], "", "__main__")
        and position[other.partition(".")[0]] >= position[name.partition(".")[0]]
        and (name, other) not in UPWARD
    ]
    assert wrong == []


def test_modules_have_no_circular_imports():
    dependencies = {}
    for name in MODULES:
        others = imported_modules(name)
        # A package imports its own modules, so a module's import of its own package is not counted.
        parents = {other for other in others if name.startswith(f"{other}.")}
        dependencies[name] = others - parents - {other for start, other in UPWARD if start == name}
    del dependencies[""]  # imports `load` lazily
    try:
        TopologicalSorter(dependencies).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_package_has_few_entries_and_each_documents_its_imports():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES
    for path in PACKAGE.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert "may import" in docstring.lower(), path


def test_no_other_package_imports_experiments():
    users = {name for name in MODULES if any(other.startswith("experiments") for other in imported_modules(name))}
    assert not {name for name in users if not name.startswith("experiments")}


@pytest.mark.parametrize("library", sorted(ALLOWED_IMPORTERS))
def test_a_library_is_imported_only_by_its_allowed_importers(library):
    users = {
        name
        for name, path in MODULES.items()
        if any(full == library or full.startswith(f"{library}.") for full in imported(path))
    }
    assert {name for name in users if not {name, name.partition(".")[0]} & ALLOWED_IMPORTERS[library]} == set()


def test_importing_every_module_changes_no_global_state():
    """Check connections, signal handlers, Pillow's limit, sys.path and, except for albumentations, the environment."""
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


def test_importing_the_networks_does_not_import_lightning():
    probe = "import sys; from segdeconv.models import SegNet; print([n for n in sys.modules if 'lightning' in n][:1])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_network_is_prepared_for_inference_in_one_place():
    users = {name for name, path in MODULES.items() if "fold_norms(" in path.read_text()}
    assert users == {"models.layers", "inference.network", "export.export"}  # definition, inference, exported files


def test_no_file_has_a_meaningless_name():
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common", "misc")]


def test_no_config_sets_num_classes():
    assert not [path for path in (ROOT / "configs").rglob("*.yaml") if "num_classes" in path.read_text()]
