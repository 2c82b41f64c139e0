"""The house: who may import whom, and what every shipped file must be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "segdeconv"

# Arrows go up only: a module imports modules of its own layer or below.
LAYERS = [
    {"allocation", "durable", "errors", "journal", "machine", "options", "png", "seeding"},
    {
        "boxes", "classes", "switches", "kernels", "fused", "fused_kernels", "layers", "lattice", "recomputation",
        "config",
    },
    {
        "data.decoding", "data.channels", "data.reading", "data.download", "data.mixing", "data.sampler",
        "data.splits", "data.store",
    },
    {
        "cards", "encoders", "balancing", "metrics", "draw", "outlines", "page", "sources", "video", "crf", "boundary",
        "calibration",
    },
    {"breakdown", "gallery"},
    {"losses", "losses.base", "losses.pixelwise", "losses.regions", "losses.combined"},
    {"fields", "flow", "tracing", "describe", "tiling"},
    {"stability", "zeiler_fergus", "decoder_stages", "switch_statistics", "figure"},
    {
        "models", "models.base", "models.basic", "models.deconvnet", "models.deeplab_largefov", "models.dropout",
        "models.fcn", "models.fpn", "models.segnet", "models.unet"
    },
    {
        "inference", "optimization", "proposals", "regions", "data.archives", "data.checksums", "data.published",
        "data.dataset",
        "data.relabelled", "data.transforms",
    },
    {
        "data", "data.ade20k", "data.camvid", "data.cityscapes", "data.folder", "data.oxford_pets", "data.shapes",
        "data.sunrgbd", "data.voc", "data.loading", "data.inspection", "data.instances", "data.cache", "checkpoint",
    },
    {
        "data.module", "task", "report", "scoring", "prediction", "loggers", "recalibration", "ablation", "uncertainty",
        "sheets", "views", "exported", "onnx_graph",
    },
    {"visualization", "export", "serving", "serving.look"},
    {"serving.server"},
    {"processes", "memory", "transfer", "evaluation", "report_page", "inspection_page"},
    {"training", "run_folder", "segmenter"},
    {"callbacks", "labelling", "runs", "switch_curves", "tiling_check", "watch"},
    {"train"},
    {
        "benchmarks", "benchmarks.contestants", "benchmarks.harness", "benchmarks.input", "benchmarks.kernels",
        "benchmarks.parts", "benchmarks.peak", "benchmarks.plot", "benchmarks.usual",
    },
    {"finders", "study", "study.paper", "study.costs", "study.results", "study.series", "study.table"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
ONLY = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "pytorch_lightning": {
        "task", "training", "runs", "callbacks", "data.module", "loggers", "processes", "switch_curves", "watch"
    },
    "lightning_fabric": {"training", "processes"},
    "albumentations": {"data.transforms"},
    "jinja2": {"page"},
    "torchvision": {"encoders"},
    "triton": {"kernels", "fused_kernels"},
    "lightning": set(),
}  # fmt: skip


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imported(path: Path, *, late: bool) -> set[str]:
    """Dotted names imported by a file; `late` counts those inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if late else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer():
    placed = set().union(*LAYERS)
    assert set(modules()) - {""} == placed


@pytest.mark.parametrize("name", sorted(set(modules()) - {""}))
def test_imports_go_up_only(name):
    layer = next(index for index, names in enumerate(LAYERS) if name in names)
    allowed = set().union(*LAYERS[: layer + 1])
    for found in imported(modules()[name], late=False):
        if found.startswith("segdeconv."):
            inner = found.removeprefix("segdeconv.")
            if inner in modules():
                assert inner in allowed, f"{name} imports {inner}, which lies above it"


@pytest.mark.parametrize("library", sorted(ONLY))
def test_a_library_is_imported_only_where_it_belongs(library):
    users = {
        name
        for name, path in modules().items()
        if any(found == library or found.startswith(f"{library}.") for found in imported(path, late=True))
    }
    assert users <= ONLY[library]


def test_importing_everything_opens_no_connection():
    refuse = "import socket\ndef refuse(*_): raise AssertionError('a connection')\nsocket.socket.connect = refuse\n"
    imports = "\n".join(f"import segdeconv.{name}" for name in modules() if name)
    done = subprocess.run([sys.executable, "-c", refuse + imports], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_networks_cost_no_import_of_the_trainer():
    probe = "import sys; from segdeconv.models import SegNet; print([n for n in sys.modules if 'lightning' in n][:1])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_name_says_nothing():
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common", "misc")]


def test_num_classes_stands_in_no_config():
    assert not [path for path in (ROOT / "configs").rglob("*.yaml") if "num_classes" in path.read_text()]
