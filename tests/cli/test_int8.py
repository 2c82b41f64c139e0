"""The options of 8-bit inference: predict and evaluate --precision int8, export --int8."""

import json

import fakes
import numpy as np
import onnx
import pytest
from PIL import Image

from segdeconv.inference.quantization import is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch has no integer convolutions for this machine")
DATA = {"_target_": "segdeconv.data.Shapes", "num_train": 3, "num_val": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    fakes.untrained(folder / "best.ckpt", DATA)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "a.png")
    return folder


def test_int8_prints_what_it_costs_and_is_calibrated_once(place, commands):
    words = ("predict", "best.ckpt", "a.png", "--precision", "int8", "--max-loss", "100")
    first = commands(*words, "--out", "first", cwd=place)
    assert first.code == 0, first.err
    assert first.out.startswith("int8: measuring ranges on 3 images of train, and scores on val, once\nint8: mIoU ")
    second = commands(*words, "--out", "second", cwd=place)
    assert second.out.splitlines()[0] == first.out.splitlines()[1]
    assert (place / "first" / "a.png").read_bytes() == (place / "second" / "a.png").read_bytes()
    done = commands("evaluate", "best.ckpt", "--precision", "int8", "--max-loss", "100", cwd=place)
    assert done.code == 0, done.err
    miou = json.loads((place / "evaluation" / "report.json").read_text())["miou"]
    assert f"int8: mIoU {100 * miou:.2f} % on val (2 images)" in done.out


@pytest.mark.slow
def test_a_file_of_8_bits_holds_integers_and_its_scores(place, commands):
    done = commands("export", "best.ckpt", "--int8", "--max-loss", "100", "--out", "small.onnx", cwd=place)
    assert done.code == 0, done.err
    graph = onnx.load(place / "small.onnx").graph
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    sources = {node.output[0]: node for node in graph.node}
    assert convolutions
    for node in convolutions:
        assert sources[node.input[0]].op_type == "DequantizeLinear"
        filters = weights[sources[node.input[1]].input[0]]
        assert filters.dtype == np.int8
        # Two products of neighbours fit into 16 bits, which are all that processors without VNNI have for their sum.
        values = filters.astype(np.int64).transpose(0, 2, 3, 1).reshape(len(filters), -1)
        assert 255 * np.abs(values[:, 1:] + values[:, :-1]).max() < 2**15
    card = json.loads((place / "small.json").read_text())
    assert card["weights"].startswith("int8")
    assert f"int8: mIoU {100 * card['int8']['int8']:.2f} % on val (2 images)" in done.out
    done = commands("export", "best.ckpt", "--int8", "--max-loss", "100", "--out", "with ranges.safetensors", cwd=place)
    assert done.code == 0, done.err
    facts = json.loads((place / "with ranges.json").read_text())["facts"]["int8"]
    assert facts["images"] == 2
    done = commands(
        "predict", "with ranges.safetensors", "a.png", "--precision", "int8", "--max-loss", "100", cwd=place
    )
    assert done.out.startswith(f"int8: mIoU {100 * facts['int8']:.2f} % on val (2 images)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("predict", "best.ckpt", "a.png", "--precision", "int8", "--max-loss", "-100"),
            "points of mIoU, more than -100",
        ),
        (("export", "best.ckpt", "--int8", "--max-loss", "-100", "--out", "x.onnx"), "points of mIoU, more than -100"),
        (("export", "best.ckpt", "--int8", "--out", "x.pt2", "--max-loss", "100"), "--int8 applies only to .onnx"),
        (("export", "best.ckpt", "--max-loss", "1", "--out", "x.onnx"), "--max-loss has no effect without --int8"),
        (("predict", "best.ckpt", "a.png", "--max-loss", "1"), "--max-loss has no effect without --precision int8"),
        (("predict", "best.ckpt", "a.png", "--precision", "int8", "--samples", "2"), "--samples is not supported"),
        (("evaluate", "best.ckpt", "--precision", "int8", "--ablate"), "need float maps"),
        (("serve", "best.ckpt", "--precision", "int8"), "--precision int8 is for predict and evaluate"),
    ],
)
def test_what_8_bits_do_not_allow_is_refused(place, commands, words, message):
    done = commands(*words, "--out", "refused", cwd=place) if words[0] == "predict" else commands(*words, cwd=place)
    assert done.code == 2
    assert message in done.error_message
    assert not (place / "refused").exists()
    assert not list(place.glob("x.*"))
