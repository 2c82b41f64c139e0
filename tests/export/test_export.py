"""Exported files: equal outputs at any size, and operators that other programs support."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from checkpoint_files import content
from PIL import Image

from segdeconv.checkpoints import checkpoint
from segdeconv.cli import predict
from segdeconv.data.files.reading import read_upright
from segdeconv.data.preprocessing import Preprocessing, resize_image
from segdeconv.errors import UsageError
from segdeconv.export import onnx as onnx_file
from segdeconv.export.export import export
from segdeconv.export.module import resize_stored_image
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import labels
from segdeconv.models import build_model, check_model

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
SLIM = {"width": 0.0625, "fc_width": 8, "depth": 11, "channels": 16, "pretrained": "none"}
NAMES = ("sky", "road", "car")


def write_checkpoint(folder, node, *, size=None, name="best.ckpt", channels=3, instance_weights=None, **preprocessing):
    """Return a checkpoint of a network with random weights and nontrivial batch norms and scores."""
    node = check_model(node)
    torch.manual_seed(0)
    model = build_model(node, len(NAMES), channels, fresh=True)
    with torch.no_grad():
        for part, value in model.state_dict().items():
            if part.endswith(("running_mean", "running_var")):
                value.copy_(torch.rand_like(value) * 0.5 + (0.5 if part.endswith("var") else 0))
            elif value.ndim > 1 and not value.any():
                value.copy_(torch.randn_like(value) * 0.1)
    data = content()
    facts, config = data["hyper_parameters"]["facts"], data["hyper_parameters"]["config"]
    facts["classes"] |= {"names": list(NAMES), "colours": [[9, 8, 7], [0, 99, 0], [0, 0, 200]], "labels": [0, 1, 2]}
    facts["preprocessing"] = {
        "size": size, "mean": [120.0, 110.0, 100.0][:channels], "std": [60.0, 61.0, 62.0][:channels], "bits": 8,
        "as_stored": False, "order": "rgb", **preprocessing,
    }  # fmt: skip
    if instance_weights:
        facts["instance_statistics"] = {"weights": instance_weights, "checked_on": "val", "before": 0.5, "after": 0.6}
    config["model"], config["dataset"] = node, {"size": size, "crop": None, "batch_size": 1, "num_workers": 0}
    facts.setdefault("precision", "32-true")
    data["state_dict"] = {f"model.{part}": value for part, value in model.state_dict().items()}
    checkpoint.write(data, folder / name)
    return checkpoint.read(folder / name)


def slim(name):
    node = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    settings = {**SLIM, "width": 4} if "basic" in name or name == "bilinear_interpolation" else SLIM
    return node | {key: value for key, value in settings.items() if key in check_model(node)}


def session(path, **settings):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path, image):
    return session(path).run(None, {"image": image})[0]


@pytest.fixture(scope="module")
def segnet(tmp_path_factory):
    """Export a slim SegNet with input size 40x56 and instance statistics, and a U-Net with preprocessing and argmax."""
    folder = tmp_path_factory.mktemp("exported")
    stages = {"stages": [[4], [8]]}
    node, weights = {"_target_": "segdeconv.models.SegNet", **stages}, {"encoder": 0.5}
    source = write_checkpoint(folder, node, size=[40, 56], order="bgr", instance_weights=weights)
    unet = write_checkpoint(folder, {"_target_": "segdeconv.models.UNet", **stages}, size=[40, 56], name="unet.ckpt")
    ends = export(unet, folder / "ends.onnx", pixels="nhwc", argmax=True)
    return folder, source, export(source, folder / "plain.onnx"), ends


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 47), (2, 64, 39)])
def test_an_onnx_file_equals_the_network_at_any_size_and_batch_size(segnet, shape):
    folder, source, *_ = segnet
    image = torch.randn(shape[0], 3, *shape[1:])
    with torch.no_grad():
        expected, plain = source.model()(image), source.without_instance_statistics().model()(image)
    assert not torch.allclose(expected, plain, atol=0.01)
    result = torch.from_numpy(run(folder / "plain.onnx", image.numpy()))
    assert expected.std() > 0.05  # so that the tolerance is meaningful
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_graph_has_only_supported_operators_even_after_optimisation(segnet, tmp_path):
    folder, *_ = segnet
    for name in ("plain.onnx", "ends.onnx"):
        graph = onnx.load(folder / name)
        onnx.checker.check_model(graph, full_check=True)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", onnx_file.OPSET)]
        used = {node.op_type for node in graph.graph.node}
        assert {"Conv", "Where", "DepthToSpace"} <= used or name == "ends.onnx"
        assert not used & {"MaxUnpool", "BatchNormalization", "ScatterND", "GatherND", "ScatterElements"}
        assert not onnx_file.foreign_operators(graph)
        assert str(ROOT).encode() not in (folder / name).read_bytes()  # no path of this machine
        session(
            folder / name,
            optimized_model_filepath=str(tmp_path / name),
            graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        )
        optimised = onnx.load(tmp_path / name).graph.node
        assert not {node.op_type for node in optimised} & onnx_file.FORBIDDEN
        assert all(len(node.output) == 1 for node in optimised if node.op_type == "MaxPool")


def test_unsupported_operators_of_a_graph_are_listed():
    node = onnx.helper.make_node
    nodes = [
        node("ScatterND", ["a", "b", "c"], ["d"]), node("MaxPool", ["d"], ["e", "f"]), node("Conv", ["e"], ["g"]),
        node("FusedConv", ["g"], ["h"], domain="com.microsoft"),
    ]  # fmt: skip
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], []))
    assert onnx_file.foreign_operators(graph) == {"ScatterND", "MaxPool with indices", "com.microsoft.FusedConv"}


def test_the_card_describes_the_interface_of_the_file(segnet):
    folder, source, plain, ends = segnet
    assert json.loads((folder / "plain.json").read_text()) == plain
    assert [entry["name"] for entry in plain["classes"]] == list(NAMES)
    assert plain["classes"][1]["colour"] == [0, 99, 0]
    assert plain["input"] == {
        "name": "image", "dtype": "float32", "axes": "NCHW", "shape": ["N", 3, "H", "W"], "channels": "bgr",
        "minimum_size": 32, "fill": 0,
    }  # fmt: skip
    assert (plain["output"]["name"], plain["output"]["shape"]) == ("logits", ["N", 3, "H", "W"])
    assert (plain["preprocessing"]["done_by"], plain["preprocessing"]["size"]) == ("you", [40, 56])
    assert plain["checkpoint"]["sha256"] == checkpoint.hash_file(source.path)
    assert ends["input"]["shape"] == ["N", "H", "W", 3]
    assert (ends["input"]["dtype"], ends["input"]["minimum_size"], ends["output"]["dtype"]) == ("uint8", 1, "uint8")
    for card, name in ((plain, "plain.onnx"), (ends, "ends.onnx")):
        assert card["sha256"] == checkpoint.hash_file(folder / name)
        (image,), (output,) = session(folder / name).get_inputs(), session(folder / name).get_outputs()
        assert (image.name, image.shape) == (card["input"]["name"], card["input"]["shape"])
        assert (output.name, output.shape) == (card["output"]["name"], card["output"]["shape"])


WITHOUT_TORCH = """
import runpy, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "segdeconv", "cv2"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
consumer, *words = sys.argv[1:]
while words:
    sys.argv, words = [consumer, *words[:3]], words[3:]
    runpy.run_path(consumer, run_name="__main__")
"""


def test_a_program_without_torch_predicts_the_same_labels(segnet, tmp_path):
    folder, source, *_ = segnet
    picture = tmp_path / "photo.png"
    Image.fromarray(fakes.image_and_mask(3, 3, (83, 121))[0]).save(picture)
    words = []
    for name in ("plain", "ends"):
        words += [folder / f"{name}.onnx", picture, tmp_path / f"{name}.png"]
    (short,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    (tmp_path / "short.py").write_text(short)
    short_program = [tmp_path / "short.py", folder / "ends.onnx", picture, tmp_path / "short.png"]
    for program in ([ROOT / "docs" / "onnx_consumer.py", *words], short_program):
        command = [sys.executable, "-c", WITHOUT_TORCH, *program]
        subprocess.run([str(word) for word in command], check=True, timeout=60)
    assert (tmp_path / "short.png").read_bytes() == (tmp_path / "ends.png").read_bytes()
    for name, loaded in (("plain", source), ("ends", checkpoint.read(folder / "unet.ckpt"))):
        preprocess = Preprocessing.from_dict({**loaded.facts["preprocessing"], "size": [40, 56]})
        image, _ = read_upright(picture)
        scores = Network(loaded.model(), torch.device("cpu"), "32-true").logits(preprocess(image)[None])
        expected, predicted = labels(scores, (83, 121))[0].numpy(), fakes.opened(tmp_path / f"{name}.png")
        assert len(np.unique(expected)) > 1
        assert predicted.getpalette()[:9] == list(loaded.classes.palette[:3].ravel())
        assert (np.array(predicted) == expected).mean() >= 0.999, name


def test_resizing_in_the_graph_equals_that_of_preprocessing():
    random = np.random.default_rng(0)
    for before, after in [((37, 51), (64, 96)), ((75, 100), (45, 45)), ((64, 80), (32, 40)), ((50, 30), (20, 60))]:
        image = random.integers(0, 256, (*before, 3)).astype(np.uint8)
        resized = resize_stored_image(torch.from_numpy(image).permute(2, 0, 1)[None].float(), after)[0].permute(1, 2, 0)
        difference = np.abs(resized.numpy() - resize_image(image, after))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.15


@pytest.mark.slow
def test_a_torch_export_file_equals_the_network(tmp_path):
    source = write_checkpoint(tmp_path, {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]})
    card = export(source, tmp_path / "net.pt2")
    assert card["input"]["minimum_size"] == 33
    program = torch.export.load(tmp_path / "net.pt2").module()
    for shape in [(1, 3, 33, 40), (2, 3, 51, 38)]:
        image = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(image), source.model()(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_half_stores_weights_in_16_bits(segnet, tmp_path):
    folder, source, *_ = segnet
    card = export(source, tmp_path / "half.onnx", half=True)
    assert card["verified"]["same_class_as_full"] >= 0.98
    initializers = onnx.load(tmp_path / "half.onnx").graph.initializer
    weights = {tensor.name: tensor for tensor in initializers if len(tensor.dims) == 4}
    assert len(weights) == 4
    assert {weight.data_type for weight in weights.values()} == {onnx.TensorProto.FLOAT16}
    image = np.random.default_rng(0).standard_normal((1, 3, 40, 41)).astype(np.float32)
    full, half = run(folder / "plain.onnx", image), run(tmp_path / "half.onnx", image)
    assert 0 < np.abs(full - half).mean() < 0.01 * full.std()


def test_a_file_with_other_outputs_is_not_written(segnet, tmp_path, monkeypatch):
    folder, source, *_ = segnet
    monkeypatch.setattr("segdeconv.export.export._trace", lambda *_: None)  # convert is replaced too
    monkeypatch.setattr(onnx_file, "convert", lambda *_, **__: onnx.load(folder / "plain.onnx"))
    (tmp_path / "net.onnx").write_bytes(b"old file")
    (tmp_path / "net.json").write_text("old card")
    wrong = lambda path: lambda image: np.random.default_rng(0).random((len(image), 3, *image.shape[2:]), np.float32)  # noqa: E731
    monkeypatch.setattr(onnx_file, "runner", wrong)
    with pytest.raises(
        UsageError, match=r"net.onnx was not written: only \d\d\.\d\d % of the pixels have the same class"
    ):
        export(source, tmp_path / "net.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "net.onnx": b"old file", "net.json": b"old card",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
@pytest.mark.parametrize("kind", ["file", "card", "changed file", "folder"])
def test_the_command_exports_over_no_file_of_others(segnet, tmp_path, commands, suffix, kind):
    _, source, *_ = segnet
    path, card = tmp_path / f"x{suffix}", tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind != "card":
        path.write_text("MINE")
    if kind == "card":
        card.write_text('{"mine": 1}')
    elif kind == "changed file":
        card.write_text(json.dumps({"file": path.name, "sha256": "0" * 64}))
    files = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    done = commands("export", source.path, "--out", path.name, cwd=tmp_path)
    assert done.code == 2
    name = card.name if kind == "card" else path.name
    assert f"{name} exists and was not written by segdeconv; it would be overwritten - choose another --out" in (
        done.error_message
    )
    assert {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()} == files


@pytest.mark.parametrize(
    ("suffix", "options", "differing"),
    [
        (".pt2", ("--argmax",), "output"),
        (".pt2", ("--preprocess",), "input, output, preprocessing"),
        (".safetensors", ("--half",), "weights"),
    ],
)
def test_an_export_is_replaced_with_a_line_if_it_differs(segnet, tmp_path, commands, suffix, options, differing):
    _, source, *_ = segnet
    for words, line in [(options, ""), (options, ""), ((), f"replaced: x{suffix}, which differed in {differing}")]:
        done = commands("export", source.path, "--out", f"x{suffix}", *words, cwd=tmp_path)
        assert done.code == 0, done.err
        assert [text for text in done.out.splitlines() if text.startswith("replaced")] == [line] * bool(line)


def test_invalid_options_are_reported(segnet, tmp_path, commands, monkeypatch):
    _, source, *_ = segnet
    (tmp_path / "there.safetensors").write_bytes(b"")
    (tmp_path / "tags.yaml").write_text("made: !!timestamp 2026-01-02\n")
    (tmp_path / "taken.yaml").write_text("config: mine\n")
    for words, sentence in [
        (
            ("--out", "net.pb"),
            "--out net.pb has an unknown format - use .onnx, .pt2 or .safetensors",
        ),
        (
            ("--out", "there.onnx"),
            "there.safetensors already exists, and there.json describes it - choose another",
        ),
        (("--out", "net.pt2", "--half"), "--half applies only to .onnx and .safetensors - leave it out"),
        (
            ("--out", "net.onnx", "--layout", "nchw"),
            "--layout nchw has no effect without --preprocess - add it",
        ),
        (("--out", "net.safetensors", "--argmax"), "--preprocess and --argmax are for graphs"),
        (("--out", "net.pt2", "--about", "a.yaml"), "--about is only for .safetensors files - leave it out"),
        (
            ("--out", "net.safetensors", "--about", "a.yaml"),
            "--about a.yaml cannot be read (FileNotFoundError) - give",
        ),
        (
            ("--out", "net.safetensors", "--about", "tags.yaml"),
            "tags.yaml is not YAML of plain values (line 1 has the tag !!timestamp) - write lines",
        ),
        (("--out", "net.safetensors", "--about", "taken.yaml"), "must be a mapping without the keys 'format'"),
    ]:
        done = commands("export", source.path, *words, cwd=tmp_path)
        assert done.code == 2, done.err
        assert sentence in done.error_message
    assert sorted(os.listdir(tmp_path)) == ["tags.yaml", "taken.yaml", "there.safetensors"]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs onnxscript - pip install onnx onnxscript onnxruntime, or write .pt2"):
        export(source, tmp_path / "net.onnx")


def test_weights_can_be_exported_alone(segnet, tmp_path, commands):
    _, source, *_ = segnet
    (tmp_path / "about.yaml").write_text("licence: CC-BY-4.0\nscores: {val: {mIoU: 0.5}}\n")
    words = ("--out", "mine.safetensors", "--half", "--about", "about.yaml")
    done = commands("export", source.path, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    shared = checkpoint.read(tmp_path / "mine.safetensors")
    assert shared.classes == source.classes
    card = json.loads((tmp_path / "mine.json").read_text())
    assert (card["licence"], card["scores"]) == ("CC-BY-4.0", {"val": {"mIoU": 0.5}})


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_every_network_exports(tmp_path, name):
    source = write_checkpoint(tmp_path, slim(name))
    model, card = source.model(), export(source, tmp_path / "net.onnx")
    assert card["input"]["minimum_size"] == model.minimum_size
    for extra in ((0, 0), (6, 17), (31, 2)):
        image = torch.randn(1, 3, *(model.minimum_size + extra_side for extra_side in extra))
        with torch.no_grad():
            expected = model(image)
        result = torch.from_numpy(run(tmp_path / "net.onnx", image.numpy()))
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_every_network_exports_to_torch_and_with_preprocessing_and_argmax(tmp_path, name):
    size = [200, 220] if name == "deconvnet" else [40, 56]
    source = write_checkpoint(tmp_path, slim(name), size=size)
    export(source, tmp_path / "net.pt2")
    export(source, tmp_path / "ends.onnx", pixels="nchw", argmax=True)
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7)).astype(np.uint8)
    assert run(tmp_path / "ends.onnx", image).shape == (2, 5, 7)


@pytest.mark.slow
def test_openvino_runs_the_files(segnet):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    import openvino

    folder, *_ = segnet
    core = openvino.Core()
    network = core.compile_model(core.read_model(folder / "plain.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = np.random.default_rng(0).standard_normal((2, 3, 45, 51)).astype(np.float32)
    np.testing.assert_allclose(network(image)[0], run(folder / "plain.onnx", image), rtol=1e-3, atol=1e-4)


def test_constants_beyond_the_range_of_half_precision_stay_float32():
    weights = {"mean": np.full((3, 1, 1), 65535.0, np.float32), "weight": np.ones((3, 3), np.float32)}
    graph = onnx.helper.make_graph(
        [], "graph", [], [], [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()]
    )
    model = onnx.helper.make_model(graph)
    onnx_file._halve(model)
    assert {entry.name: entry.data_type for entry in model.graph.initializer} == {
        "mean": onnx.TensorProto.FLOAT, "weight.half": onnx.TensorProto.FLOAT16,
    }  # fmt: skip


def test_predict_and_export_print_that_their_precisions_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    node = {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]}
    path = write_checkpoint(tmp_path, node, size=[32, 32]).path
    trained = checkpoint.load_plain(path)
    trained["hyper_parameters"]["facts"]["precision"] = "bf16-mixed"
    checkpoint.write(trained, path)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("image.png")
    export_command = runpy.run_path(str(ROOT / "scripts" / "export.py"))["main"]
    commands = {"predict": lambda: predict.run(""), "export": export_command}
    words = {"predict": ("image.png", "--overwrite"), "export": ("--out", "small.pt2")}
    for fast, name, said in (("bf16-mixed", "export", 1), ("bf16-mixed", "predict", 1), ("32-true", "predict", 0)):
        monkeypatch.setattr("segdeconv.system.devices.fast_precision", lambda _, fast=fast: fast)
        monkeypatch.setattr("sys.argv", [name, str(path), *words[name]])
        commands[name]()
        out = capsys.readouterr().out
        assert (out.count("precision: "), out.count("bf16-mixed")) == (said, said)
