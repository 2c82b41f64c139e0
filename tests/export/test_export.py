"""Exported files: what the network gives, at any size, with operators that other programs know."""

import importlib.util
import json
import os
import re
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
from segdeconv.data.files.reading import read_upright
from segdeconv.data.preprocessing import Preprocessing, resize_image
from segdeconv.errors import UsageError
from segdeconv.export import onnx as onnx_file
from segdeconv.export.export import export
from segdeconv.export.module import resized_as_stored
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import labels
from segdeconv.models import build_model, check_model

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
SLIM = {"width": 0.0625, "fc_width": 8, "depth": 11, "channels": 16, "pretrained": "none"}
NAMES = ("sky", "road", "car")


def made(folder, node, *, size=None, name="best.ckpt", channels=3, **preprocessing):
    """A checkpoint of a network with random weights whose batch norms and scores are not trivial."""
    node = check_model(node)
    torch.manual_seed(0)
    model = build_model(node, len(NAMES), channels, fresh=True)
    with torch.no_grad():
        for part, value in model.state_dict().items():
            if part.endswith(("running_mean", "running_var")):
                value.copy_(torch.rand_like(value) * 0.5 + (0.5 if part.endswith("var") else 0))
            elif value.ndim > 1 and not value.any():
                value.copy_(torch.randn_like(value) * 0.1)
    whole = content()
    facts, config = whole["hyper_parameters"]["facts"], whole["hyper_parameters"]["config"]
    facts["classes"] |= {"names": list(NAMES), "colours": [[9, 8, 7], [0, 99, 0], [0, 0, 200]], "labels": [0, 1, 2]}
    facts["preprocessing"] = {
        "size": size, "mean": [120.0, 110.0, 100.0][:channels], "std": [60.0, 61.0, 62.0][:channels], "bits": 8,
        "as_stored": False, "order": "rgb", **preprocessing,
    }  # fmt: skip
    config["model"], config["dataset"] = node, {"size": size, "crop": None, "batch_size": 1, "num_workers": 0}
    facts.setdefault("precision", "32-true")
    whole["state_dict"] = {f"model.{part}": value for part, value in model.state_dict().items()}
    checkpoint.write(whole, folder / name)
    return checkpoint.read(folder / name)


def slim(name):
    node = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    few = {**SLIM, "width": 4} if "basic" in name or name == "bilinear_interpolation" else SLIM
    return node | {key: value for key, value in few.items() if key in check_model(node)}


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
    """A slim SegNet that sees pictures at 40x56, exported as plain.onnx, and a U-Net with both of its ends."""
    place = tmp_path_factory.mktemp("exported")
    stages = {"stages": [[4], [8]]}
    read = made(place, {"_target_": "segdeconv.models.SegNet", **stages}, size=[40, 56], order="bgr")
    unet = made(place, {"_target_": "segdeconv.models.UNet", **stages}, size=[40, 56], name="unet.ckpt")
    ends = export(unet, place / "ends.onnx", pixels="nhwc", argmax=True)
    return place, read, export(read, place / "plain.onnx"), ends


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 47), (2, 64, 39)])
def test_an_onnx_file_gives_what_the_network_gives_at_any_size_and_number(segnet, shape):
    place, read, *_ = segnet
    image = torch.randn(shape[0], 3, *shape[1:])
    with torch.no_grad():
        expected = read.model()(image)
    found = torch.from_numpy(run(place / "plain.onnx", image.numpy()))
    assert expected.std() > 0.05  # so that the tolerance means something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_graph_has_no_operator_that_others_do_not_know_also_after_optimisation(segnet, tmp_path):
    place, *_ = segnet
    for name in ("plain.onnx", "ends.onnx"):
        graph = onnx.load(place / name)
        onnx.checker.check_model(graph, full_check=True)
        assert [(one.domain, one.version) for one in graph.opset_import] == [("", onnx_file.OPSET)]
        used = {node.op_type for node in graph.graph.node}
        assert {"Conv", "Where", "DepthToSpace"} <= used or name == "ends.onnx"
        assert not used & {"MaxUnpool", "BatchNormalization", "ScatterND", "GatherND", "ScatterElements"}
        assert not onnx_file.foreign_operators(graph)
        assert str(ROOT).encode() not in (place / name).read_bytes()  # where it was made is nobody's business
        session(
            place / name,
            optimized_model_filepath=str(tmp_path / name),
            graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        )
        optimised = onnx.load(tmp_path / name).graph.node
        assert not {node.op_type for node in optimised} & onnx_file.FORBIDDEN
        assert all(len(node.output) == 1 for node in optimised if node.op_type == "MaxPool")


def test_what_others_do_not_know_is_found_in_a_graph():
    node = onnx.helper.make_node
    nodes = [
        node("ScatterND", ["a", "b", "c"], ["d"]), node("MaxPool", ["d"], ["e", "f"]), node("Conv", ["e"], ["g"]),
        node("FusedConv", ["g"], ["h"], domain="com.microsoft"),
    ]  # fmt: skip
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], []))
    assert onnx_file.foreign_operators(graph) == {"ScatterND", "MaxPool with indices", "com.microsoft.FusedConv"}


def test_the_card_says_how_to_use_the_file(segnet):
    place, read, plain, ends = segnet
    assert json.loads((place / "plain.json").read_text()) == plain
    assert [one["name"] for one in plain["classes"]] == list(NAMES)
    assert plain["classes"][1]["colour"] == [0, 99, 0]
    assert plain["input"] == {
        "name": "image", "dtype": "float32", "axes": "NCHW", "shape": ["N", 3, "H", "W"], "channels": "bgr",
        "minimum_size": 32, "fill": 0,
    }  # fmt: skip
    assert (plain["output"]["name"], plain["output"]["shape"]) == ("logits", ["N", 3, "H", "W"])
    assert (plain["preprocessing"]["done_by"], plain["preprocessing"]["size"]) == ("you", [40, 56])
    assert plain["checkpoint"]["sha256"] == checkpoint.hash_file(read.path)
    assert ends["input"]["shape"] == ["N", "H", "W", 3]
    assert (ends["input"]["dtype"], ends["input"]["minimum_size"], ends["output"]["dtype"]) == ("uint8", 1, "uint8")
    for card, name in ((plain, "plain.onnx"), (ends, "ends.onnx")):
        assert card["sha256"] == checkpoint.hash_file(place / name)
        (given,), (gives,) = session(place / name).get_inputs(), session(place / name).get_outputs()
        assert (given.name, given.shape) == (card["input"]["name"], card["input"]["shape"])
        assert (gives.name, gives.shape) == (card["output"]["name"], card["output"]["shape"])


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


def test_a_program_without_torch_labels_a_picture_as_predict_does(segnet, tmp_path):
    place, read, *_ = segnet
    picture = tmp_path / "photo.png"
    Image.fromarray(fakes.image_and_mask(3, 3, (83, 121))[0]).save(picture)
    words = []
    for name in ("plain", "ends"):
        words += [place / f"{name}.onnx", picture, tmp_path / f"{name}.png"]
    (short,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    (tmp_path / "short.py").write_text(short)
    shortly = [tmp_path / "short.py", place / "ends.onnx", picture, tmp_path / "short.png"]
    for program in ([ROOT / "docs" / "onnx_consumer.py", *words], shortly):
        typed = [sys.executable, "-c", WITHOUT_TORCH, *program]
        subprocess.run([str(word) for word in typed], check=True, timeout=60)
    assert (tmp_path / "short.png").read_bytes() == (tmp_path / "ends.png").read_bytes()
    for name, seen_by in (("plain", read), ("ends", checkpoint.read(place / "unet.ckpt"))):
        preprocess = Preprocessing.from_dict({**seen_by.facts["preprocessing"], "size": [40, 56]})
        image, _ = read_upright(picture)
        scores = Network(seen_by.model(), torch.device("cpu"), "32-true").logits(preprocess(image)[None])
        expected, found = labels(scores, (83, 121))[0].numpy(), fakes.opened(tmp_path / f"{name}.png")
        assert len(np.unique(expected)) > 1
        assert found.getpalette()[:9] == list(seen_by.classes.palette[:3].ravel())
        assert (np.array(found) == expected).mean() >= 0.999, name


def test_resizing_in_the_graph_is_that_of_the_pictures():
    random = np.random.default_rng(0)
    for before, after in [((37, 51), (64, 96)), ((75, 100), (45, 45)), ((64, 80), (32, 40)), ((50, 30), (20, 60))]:
        image = random.integers(0, 256, (*before, 3)).astype(np.uint8)
        ours = resized_as_stored(torch.from_numpy(image).permute(2, 0, 1)[None].float(), after)[0].permute(1, 2, 0)
        difference = np.abs(ours.numpy() - resize_image(image, after))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.15


@pytest.mark.slow
def test_torch_export_gives_what_the_network_gives(tmp_path):
    read = made(tmp_path, {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]})
    card = export(read, tmp_path / "net.pt2")
    assert card["input"]["minimum_size"] == 33
    program = torch.export.load(tmp_path / "net.pt2").module()
    for shape in [(1, 3, 33, 40), (2, 3, 51, 38)]:
        image = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(image), read.model()(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_half_the_bytes_and_the_numbers_of_16_bit_weights(segnet, tmp_path):
    place, read, *_ = segnet
    card = export(read, tmp_path / "half.onnx", half=True)
    assert card["verified"]["same_class_as_full"] >= 0.98
    weights = {one.name: one for one in onnx.load(tmp_path / "half.onnx").graph.initializer if len(one.dims) == 4}
    assert len(weights) == 4
    assert {one.data_type for one in weights.values()} == {onnx.TensorProto.FLOAT16}
    image = np.random.default_rng(0).standard_normal((1, 3, 40, 41)).astype(np.float32)
    full, half = run(place / "plain.onnx", image), run(tmp_path / "half.onnx", image)
    assert 0 < np.abs(full - half).mean() < 0.01 * full.std()


def test_a_file_that_gives_something_else_is_not_written(segnet, tmp_path, monkeypatch):
    place, read, *_ = segnet
    monkeypatch.setattr("segdeconv.export.export._traced", lambda *_: None)  # it was, and this is what it becomes
    monkeypatch.setattr(onnx_file, "convert", lambda *_, **__: onnx.load(place / "plain.onnx"))
    (tmp_path / "net.onnx").write_bytes(b"the one before")
    (tmp_path / "net.json").write_text("its card")
    wrong = lambda path: lambda image: np.random.default_rng(0).random((len(image), 3, *image.shape[2:]), np.float32)  # noqa: E731
    monkeypatch.setattr(onnx_file, "runner", wrong)
    with pytest.raises(
        UsageError, match=r"net.onnx was not written: \d\d\.\d\d % of the pixels have the class that the"
    ):
        export(read, tmp_path / "net.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "net.onnx": b"the one before", "net.json": b"its card",
    }  # fmt: skip


def test_mistakes_are_one_sentence(segnet, tmp_path, commands, monkeypatch):
    _, read, *_ = segnet
    (tmp_path / "there.safetensors").write_bytes(b"")
    (tmp_path / "dates.yaml").write_text("made: 2026-01-02\n")
    (tmp_path / "taken.yaml").write_text("config: mine\n")
    for words, sentence in [
        (("--out", "net.pb"), "--out net.pb is no form to export to - end it in .onnx, .pt2 or .safetensors"),
        (("--out", "there.onnx"), "there.safetensors is there, and there.json speaks of it - choose another name"),
        (("--out", "net.pt2", "--half"), "--half is for .onnx and .safetensors - leave it out"),
        (
            ("--out", "net.onnx", "--layout", "nchw"),
            "--layout nchw has no effect without --preprocess - add it",
        ),
        (("--out", "net.safetensors", "--argmax"), "--preprocess and --argmax are for graphs"),
        (("--out", "net.pt2", "--about", "a.yaml"), "--about is only for .safetensors files - leave it out"),
        (
            ("--out", "net.safetensors", "--about", "a.yaml"),
            "--about a.yaml cannot be read as plain YAML (FileNotFound",
        ),
        (
            ("--out", "net.safetensors", "--about", "dates.yaml"),
            "cannot be read as plain YAML (TypeError) - write lines",
        ),
        (("--out", "net.safetensors", "--about", "taken.yaml"), "must be a mapping without the keys 'format'"),
    ]:
        done = commands("export", read.path, *words, cwd=tmp_path)
        assert done.code == 2, done.err
        assert sentence in done.error_message
    assert sorted(os.listdir(tmp_path)) == ["dates.yaml", "taken.yaml", "there.safetensors"]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs onnxscript - pip install onnx onnxscript onnxruntime, or write .pt2"):
        export(read, tmp_path / "net.onnx")


def test_weights_are_exported_too(segnet, tmp_path, commands):
    _, read, *_ = segnet
    (tmp_path / "about.yaml").write_text("licence: CC-BY-4.0\nscores: {val: {mIoU: 0.5}}\n")
    words = ("--out", "mine.safetensors", "--half", "--about", "about.yaml")
    done = commands("export", read.path, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    again = checkpoint.read(tmp_path / "mine.safetensors")
    assert again.classes == read.classes
    card = json.loads((tmp_path / "mine.json").read_text())
    assert (card["licence"], card["scores"]) == ("CC-BY-4.0", {"val": {"mIoU": 0.5}})


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_every_network_exports(tmp_path, name):
    read = made(tmp_path, slim(name))
    model, card = read.model(), export(read, tmp_path / "net.onnx")
    assert card["input"]["minimum_size"] == model.minimum_size
    for extra in ((0, 0), (6, 17), (31, 2)):
        image = torch.randn(1, 3, *(model.minimum_size + more for more in extra))
        with torch.no_grad():
            expected = model(image)
        found = torch.from_numpy(run(tmp_path / "net.onnx", image.numpy()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_every_network_exports_to_torch_and_with_both_ends(tmp_path, name):
    size = [200, 220] if name == "deconvnet" else [40, 56]
    read = made(tmp_path, slim(name), size=size)
    export(read, tmp_path / "net.pt2")
    export(read, tmp_path / "ends.onnx", pixels="nchw", argmax=True)
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7)).astype(np.uint8)
    assert run(tmp_path / "ends.onnx", image).shape == (2, 5, 7)


@pytest.mark.slow
def test_openvino_runs_the_files_too(segnet):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    import openvino

    place, *_ = segnet
    core = openvino.Core()
    network = core.compile_model(core.read_model(place / "plain.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = np.random.default_rng(0).standard_normal((2, 3, 45, 51)).astype(np.float32)
    np.testing.assert_allclose(network(image)[0], run(place / "plain.onnx", image), rtol=1e-3, atol=1e-4)
