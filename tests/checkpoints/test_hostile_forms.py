"""Checkpoints whose content has another form than training writes: endless, huge, or of the wrong types."""

import functools
import inspect
import io
import json
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import content

from segdeconv import models
from segdeconv.checkpoints import checkpoint
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models.base import WithoutMemory
from segdeconv.training.resume import AnyName

SECONDS = 1.0  # in which a checkpoint has to be refused


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def require_refused(path, match=" - ", **arguments):
    """Check that a checkpoint is refused by a message of one line, and soon."""
    started = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.read(path, **arguments).model()
    assert time.process_time() - started < SECONDS
    message = str(caught.value)
    assert len(message) < 1000
    assert "\n" not in message
    assert Path(path).stem in message
    assert " - " in message


def written(data, name="evil.ckpt"):
    """Write a checkpoint without a sidecar, which would only detect that it was changed."""
    torch.save(data, name)
    return Path(name)


@functools.cache
def weights_and_card():
    source = checkpoint.read(written(content(), "good.ckpt"))
    path = Path("good.safetensors")
    checkpoint.write_weights(source, path)
    return path.read_bytes(), json.loads(path.with_suffix(".json").read_text())


def written_card(data, name="evil.safetensors"):
    """Write weights and a card with this config and metadata."""
    weights, card = weights_and_card()
    path = Path(name)
    path.write_bytes(weights)
    path.with_suffix(".json").write_text(json.dumps({**card, **data["hyper_parameters"]}))
    return path


# Structure


def nested(depth, kind=list):
    value = 1
    for _ in range(depth):
        value = [value] if kind is list else (value,) if kind is tuple else {"a": value}
    return value


def shared(depth, kind=list):
    """Return a value that refers twice to a value that refers twice, and so on: small, but endless for a walk."""
    value = kind([1]) if kind is not dict else {"a": 1}
    for _ in range(depth):
        value = {"a": value, "b": value} if kind is dict else kind([value, value])
    return value


def cyclic():
    value = []
    value.append(value)
    return value


STRUCTURES = {
    **{f"{kind.__name__} {depth} deep": functools.partial(nested, depth, kind)
       for kind in (list, dict, tuple) for depth in (80,)},
    **{f"{kind.__name__} shared {depth} deep": functools.partial(shared, depth, kind)
       for kind in (list, dict) for depth in (20, 40)},
    "cyclic": cyclic,
    "wide": lambda: [0] * 50_000,
    "long text": lambda: "a" * 5_000_000,
    "shared text": lambda: ["a" * 1_000_000] * 1000,
    "long integer": lambda: 1 << 100,
    "lone surrogate": lambda: "\ud800",
    "nan": lambda: float("nan"),
    "bytes": lambda: bytearray(8),
    "tensor": lambda: torch.zeros(3),
}  # fmt: skip


@pytest.mark.parametrize("place", ["config", "facts", "dataset"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_config_and_metadata_of_other_structures_are_refused(name, place):
    data = content()
    parts = data["hyper_parameters"]
    (parts["config"].setdefault("dataset", {}) if place == "dataset" else parts[place])["x"] = STRUCTURES[name]()
    buffer = io.BytesIO()
    try:
        torch.save(data, buffer)
    except UnicodeEncodeError:  # torch cannot write it into a pickle
        path = written_card(data)
    except RecursionError:
        pytest.skip("torch cannot write it")
    else:
        path = Path("evil.ckpt")
        path.write_bytes(buffer.getvalue())
    require_refused(
        path, "evil.ckpt cannot be read safely|does not contain its config and metadata|is not a valid card"
    )


@pytest.mark.parametrize("value", [None, "none", 1, []])
@pytest.mark.parametrize("place", ["config", "facts", "model"])
def test_parts_that_are_not_mappings_are_refused(place, value):
    data = content()
    parts = data["hyper_parameters"]
    (parts["config"] if place == "model" else parts)[place] = value
    require_refused(written(data), "is not a segdeconv checkpoint")


def test_a_key_that_takes_forever_to_hash_is_refused():
    key = (1,)
    for _ in range(60):
        key = (key, key)
    data = pickle.dumps((key,), protocol=2)[:-1]  # a tuple that becomes the key of a mapping
    rewrite_pickle(written(content()), lambda old: b"\x80\x02}" + data[2:] + b"K\x01s.")
    require_refused("evil.ckpt", "a tuple of more than")


@pytest.mark.parametrize("depth", [10, 1000, 200_000])
def test_objects_nested_by_the_pickle_itself_are_refused(depth):
    rewrite_pickle(written(content()), lambda old: b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    require_refused("evil.ckpt")


def require_weights(network, data):
    expected = {name.removeprefix("model."): value for name, value in data["state_dict"].items()}
    found = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def rewrite_pickle(path, change):
    """Replace the pickle in a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = change(entries[name])
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


def test_a_pickle_of_the_right_form_is_still_read_after_it_was_packed_again():
    data = content()
    rewrite_pickle(written(data), lambda old: old)
    require_weights(checkpoint.read("evil.ckpt").model(), data)


@pytest.mark.parametrize("change", [
    lambda old: old[: len(old) // 2],
    lambda old: b"",
    lambda old: b"\x80\x02N" * 400_000 + b".",
    lambda old: old.replace(b"FloatStorage", b"HalfStorage", 1),
    lambda old: old.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
], ids=["truncated", "empty", "steps", "storage of another type", "other function"])  # fmt: skip
def test_a_pickle_of_another_form_is_refused(change):
    rewrite_pickle(written(content()), change)
    require_refused("evil.ckpt", "cannot be read safely")


def test_an_archive_that_readers_may_read_differently_is_refused():
    path = written(content())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.infolist()[0].filename, b"\x80\x02}.")
    require_refused(path, "its archive is not one")


def test_attributes_of_an_ordered_dict_do_not_replace_its_methods():
    data = content()
    weights = OrderedDict(data["state_dict"])
    weights.keys = {}
    data["state_dict"] = weights
    require_weights(checkpoint.read(written(data)).model(), data)


# Tensors


TENSORS = {
    "stride 0": lambda: torch.zeros(1).expand(1 << 40),
    "stride 0 in one dimension": lambda: torch.zeros(1, 4).expand(1 << 30, 4),
    "overlapping": lambda: torch.zeros(8).as_strided((4, 4), (1, 1)),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.quint8),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64),
    "meta": lambda: torch.empty(1 << 50, device="meta"),
    **{f"{dtype}": functools.partial(torch.empty, 4, dtype=dtype)
       for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64, torch.complex128)},
    "float4": lambda: torch.empty(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "infinite in float32": lambda: torch.full((4,), 1e300, dtype=torch.float64),
    "none": lambda: None,
    "list": lambda: [1.0],
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
def test_weights_of_other_layouts_and_types_are_refused(name):
    data = content()
    data["state_dict"] = {**data["state_dict"], "model.x": TENSORS[name]()}
    require_refused(written(data))


def test_weights_that_are_expanded_many_times_are_refused():
    data = content()
    whole = torch.zeros(100_000)
    data["state_dict"] = {**data["state_dict"], **{f"model.x{index}": whole for index in range(1000)}}
    require_refused(written(data), "larger than the file")


@pytest.mark.parametrize("factor", [0, 2, 1 << 40])
def test_a_storage_whose_size_is_not_that_in_the_archive_is_refused(factor):
    """torch reads beyond the bytes of a storage that is shorter than its pickle says."""
    data = content()
    data["state_dict"]["model.x"] = torch.zeros(54321)
    number = pickle.dumps(54321, protocol=2)[2:-1]
    other = pickle.dumps(54321 * factor, protocol=2)[2:-1]
    rewrite_pickle(written(data), lambda old: old.replace(number, other))
    require_refused("evil.ckpt", "storage")


# Values


def set_in(data, path, value):
    *parents, last = path.split(".")
    node = data["hyper_parameters"]
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value


INF, NAN = float("inf"), float("nan")
TEXTS = (None, "", "red", b"x", 5, {}, [], [[]], {"a": 1}, True)
VALUES = {
    "facts.preprocessing.mean": [*TEXTS, [NAN] * 3, [INF] * 3, [0.0] * 2, ["0"] * 3, [None] * 3, [1e300] * 3,
                                 [0.0] * 5000, [True] * 3],
    "facts.preprocessing.std": [*TEXTS, [0, 0, 0], [0.0, 1.0, 1.0], [NAN] * 3, [-1.0] * 3, [INF] * 3, [1.0] * 4,
                                [1e-300] * 3],
    "facts.preprocessing.bits": [0, 7, "8", None, 8.0, True],
    "facts.preprocessing.order": ["grey", None, ["rgb"]],
    "facts.preprocessing.as_stored": [1, "no", None],
    "facts.preprocessing.size": ["ab", [1], [0, 0], [-1, 4], [1.5, 4], ["1", "1"], [1 << 40, 1 << 40], 5],
    "facts.preprocessing": list(TEXTS),
    "facts.classes": list(TEXTS),
    "facts.classes.names": [*TEXTS, ["a"], ["a", "a"], [1, 2], ["a", None], ["a", ["b"]], ["a"] * 300, "ab"],
    "facts.classes.colours": [*TEXTS, [[0, 0, 0]], [[0, 0], [1, 1]], [[0, 0, 300], [1, 1, 1]],
                              [[0, 0, 0.5], [1, 1, 1]]],
    "facts.classes.ignore_index": ["255", None, -1, 0, 1, 256, 255.0, [255], True],
    "facts.classes.labels": ["ab", [0], [0, 0], [0, "1"], [0, -1], [0, 1 << 20], [0, 1.0]],
    "facts.classes.ignored_labels": ["ab", ["a"], [1.5], [[1]], 5],
    "facts.class_weights": ["ab", [1.0], [1.0, NAN], [1.0, INF], [1.0, -1.0], [1.0, "1"], 5, {"a": 1}],
    "facts.fingerprints": [None, [], 5, {"train": 1}],
    "facts.precision": [None, 16, ["32-true"]],
    "config.dataset.size": ["ab", [1], [0, 0], [-1, 4], [1.5, 4], [1 << 40, 1 << 40], 5, True],
    "config.dataset": [5, "ab", [1]],
    "config.model": [5, None, [], {}, {"_target_": 5}, {"_target_": None}, {"_target_": "segdeconv.models.SegNet"}],
    "config.model.stages": ["ab", 5, [[1e9]], [[10**9], [10**9]], [[-1]], [[0]], [["a"]], [[NAN]], [[4], [10**12]]],
    "config.model.width": ["ab", 0, -1.0, 1e9, 1e300, [1.0], NAN, INF],
}  # fmt: skip


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("path", VALUES)
def test_values_of_other_types_and_ranges_are_refused(path, form):
    for value in VALUES[path]:
        data = content()
        set_in(data, path, value)
        if form == "safetensors" and isinstance(value, bytes):
            continue
        if path == "config.model.width":  # stages that are given do not depend on it
            del data["hyper_parameters"]["config"]["model"]["stages"]
        require_refused(written(data) if form == "ckpt" else written_card(data), trust=AnyName())


# Half precision


@pytest.mark.parametrize("number", [65520.0, -70000.0, 1e30])
def test_weights_beyond_the_range_of_half_precision_are_not_written_in_it(number):
    data = content()
    name = next(name for name, value in data["state_dict"].items() if value.ndim == 4)
    data["state_dict"][name].view(-1)[0] = number
    source = checkpoint.read(written(data))
    with pytest.raises(UsageError, match=rf"{name.removeprefix('model.')} contains values beyond .* - write the"):
        checkpoint.write_weights(source, Path("half.safetensors"), half=True)
    assert not Path("half.safetensors").exists()
    checkpoint.write_weights(source, Path("full.safetensors"))
    checkpoint.read("full.safetensors")


@pytest.mark.parametrize("name", sorted(name for name in checkpoint.ADMITTED if ".models." in name))
def test_every_network_can_be_described_without_memory(name):
    class_ = getattr(models, name.rpartition(".")[2])
    arguments = {"pretrained": "none"} if "pretrained" in inspect.signature(class_).parameters else {}
    with WithoutMemory():
        state = class_(num_classes=3, **arguments).state_dict()
    on_device = [tensor for tensor in state.values() if tensor.device.type != "meta"]
    assert sum(tensor.numel() for tensor in on_device) < 100_000  # the filters that FCN interpolates with
    assert len(state) > len(on_device) + 4
