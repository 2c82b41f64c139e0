"""Malicious files: each payload runs in an unsafe reader and is refused by segdeconv's readers."""

import contextlib
import io
import os
import pickle
import re
import shutil
import stat
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import hydra.utils
import numpy as np
import pytest
import torch
import yaml
from checkpoint_files import content
from PIL import Image

from segdeconv.checkpoints import checkpoint
from segdeconv.config import override
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.files.archives import unpack_tar, unpack_zip
from segdeconv.data.files.reading import read_image, read_labels
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.training.resume import find_run, open_run

MARKER = "marker"  # in the current folder; each test has its own


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")


def fired():
    """Return whether a payload left its marker here or in the parent folder, and remove the marker."""
    markers = [path for path in (Path(MARKER), Path("..") / MARKER) if os.path.lexists(path)]
    for path in markers:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return bool(markers)


class Call:
    """A call that is executed when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def through_getattr():
    return Call(getattr, Path(MARKER), "touch")


def built():
    """Return a call of `exec`."""
    return Call(exec, f"import pathlib; pathlib.Path({MARKER!r}).touch()")


def nested():
    """Return a pickle that calls torch.load on a second pickle."""
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {MARKER}"), inner)
    return Call(_load_unsafely, inner.getvalue())


def _load_unsafely(data):
    return torch.load(io.BytesIO(data), weights_only=False)


# Checkpoints: pickles

PICKLES = {
    "os.system": lambda: Call(os.system, f"touch {MARKER}"),
    "eval": lambda: Call(eval, f"open({MARKER!r}, 'w').close()"),
    "exec": built,
    "open": lambda: Call(Path(MARKER).touch),
    "mkdir by pathlib": lambda: Call(Path(MARKER).write_text, "x"),
    "shutil.copy": lambda: Call(shutil.copy, os.devnull, MARKER),
    "numpy": lambda: Call(np.savetxt, MARKER, [0]),
    "numpy.load": lambda: Call(_numpy_pickle, pickle.dumps(Call(os.system, f"touch {MARKER}"))),
    "nested torch.load": nested,
    "torch.save": lambda: Call(torch.save, 1, MARKER),
    "hydra": lambda: Call(hydra.utils.instantiate, {"_target_": "builtins.open", "file": MARKER, "mode": "w"}),
    "yaml": lambda: Call(yaml.unsafe_load, f"!!python/object/apply:os.system ['touch {MARKER}']"),
}


def _numpy_pickle(data):
    return pickle.loads(data)


def whole_checkpoint(payload, path):
    torch.save(content(payload=payload), path)


def bare_pickle(payload, path):
    path.write_bytes(pickle.dumps(payload))


def old_format(payload, path):
    torch.save(content(payload=payload), path, _use_new_zipfile_serialization=False)


def in_the_weights(payload, path):
    data = content()
    torch.save({**data, "state_dict": {**data["state_dict"], "model.x": payload}}, path)


FORMS = (whole_checkpoint, bare_pickle, old_format, in_the_weights)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_carries_a_call_is_refused(name, form, monkeypatch):
    path = Path("evil.ckpt")
    form(PICKLES[name](), path)
    torch.load(path, weights_only=False) if form is not bare_pickle else pickle.loads(path.read_bytes())
    assert fired(), "the payload must run in an unsafe load, or this test proves nothing"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for read in (checkpoint.read, checkpoint.load_plain):
        with pytest.raises(CheckpointError, match=r"evil.ckpt cannot be read safely"):
            read(path)
    assert not fired()


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        torch.jit.script(torch.nn.Linear(1, 1)).save("scripted.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        checkpoint.read("scripted.ckpt")


def test_a_compressed_checkpoint_is_refused_before_it_is_decompressed():
    torch.save(content(), "good.ckpt")
    with zipfile.ZipFile("good.ckpt") as good, zipfile.ZipFile("evil.ckpt", "w", zipfile.ZIP_DEFLATED) as evil:
        for entry in good.infolist():
            evil.writestr(entry.filename, good.read(entry))
        evil.writestr("good/data/999", bytes(50_000_000))
    with pytest.raises(CheckpointError, match=r"cannot be read safely as a checkpoint \(BadZipFile\)"):
        checkpoint.read("evil.ckpt")


# Configs that hydra.utils.instantiate would run

CONFIGS = {
    "numpy.load": {"_target_": "numpy.load", "file": "evil.npy", "allow_pickle": True},
    "torch.load": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
    "torch.hub": {"_target_": "torch.hub.load", "repo_or_dir": ".", "source": "local", "model": "entry"},
    "collect_env": {"_target_": "torch.utils.collect_env.run", "command": f"touch {MARKER}"},
    "numpy measure": {
        "_target_": "numpy.testing.measure", "code_str": f"__import__('pathlib').Path({MARKER!r}).touch()",
    },
    "sitedir": {"_target_": "site.addsitedir", "sitedir": "."},
    "open": {"_target_": "builtins.open", "file": MARKER, "mode": "w"},
    "write_text": {"_target_": "pathlib.Path.write_text", "_args_": [
        {"_target_": "pathlib.Path", "_args_": [MARKER]}, ""]},
    "savetxt": {"_target_": "numpy.savetxt", "fname": MARKER, "X": [0]},
    "torch.save": {"_target_": "torch.save", "obj": 1, "f": MARKER},
    "mkdir": {"_target_": "os.mkdir", "path": MARKER},
    "makedirs": {"_target_": "os.makedirs", "name": MARKER},
    "copy": {"_target_": "shutil.copy", "src": os.devnull, "dst": MARKER},
    "symlink": {"_target_": "os.symlink", "src": "/", "dst": MARKER},
    "import": {"_target_": "evil.entry"},
    "nested": {"_target_": "segdeconv.models.SegNet", "stages": [{"_target_": "shutil.copy", "src": os.devnull,
        "dst": MARKER}]},
    "partial": {"_target_": "shutil.copy", "_partial_": False, "src": os.devnull, "dst": MARKER},
}  # fmt: skip
PLACES = {
    "model": lambda data, node: data["hyper_parameters"]["config"].update(model=node),
    "augment": lambda data, node: data["hyper_parameters"]["config"].update(augment={"x": node}),
    "facts": lambda data, node: data["hyper_parameters"]["facts"].update(more=[{"x": node}]),
}


@pytest.fixture
def _bait(monkeypatch):
    """Create the files that the payloads read."""
    call = Call(os.system, f"touch {MARKER}")
    np.save("evil.npy", np.array([call], dtype=object), allow_pickle=True)
    torch.save(call, "evil.pt")
    touch = f"__import__('pathlib').Path({MARKER!r}).touch()"
    Path("evil.py").write_text(f'"""\n>>> {touch}\n"""\n{touch}\ndef entry(): pass\n')
    Path("hubconf.py").write_text(f"{touch}\ndef entry(): pass\n")
    Path("evil.pth").write_text(f"import os; {touch}\n")
    monkeypatch.syspath_prepend(".")
    yield
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("_bait")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_config_in_a_checkpoint_builds_no_foreign_class(name):
    node = CONFIGS[name]
    with contextlib.suppress(Exception):  # some payloads raise after they ran
        hydra.utils.instantiate(node)
    assert fired(), "the payload must run in an unsafe builder, or this test proves nothing"
    for place, put in PLACES.items():
        data = content()
        put(data, node)
        path = Path(f"{place}.ckpt")
        checkpoint.write(data, path)
        with pytest.raises(CheckpointError, match=r"which (is|are) not part of segdeconv - if you trust the author"):
            checkpoint.read(path)
    assert not fired()


def test_overrides_cannot_change_the_classes_that_a_checkpoint_builds():
    for word in ("model._target_=os.system", "augment.x._target_=os.system", "_target_=os.system"):
        with pytest.raises(UsageError, match=r"cannot be changed|unknown key"):
            override(content()["hyper_parameters"]["config"], [word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dataset.rot=x", "unknown key dataset.rot - did you mean 'root'?"),
        ("trainer.max_epochs=3", "trainer.max_epochs has no effect on a trained network"),
        ("datset.root=x", "unknown key datset.root - did you mean 'dataset'?"),
        ("dataset.mean=[1,2,3]", "dataset.mean has no effect on a trained network"),
        ("model=unet", "model has no effect on a trained network"),
        ("dataset.size=None", "dataset.size=None: input should be a valid tuple"),
        ("dataset.size=[0,0]", "dataset.size=[0, 0]: input should be greater than or equal to 1"),
        ("dataset.batch_size=two", "dataset.batch_size=two: input should be a valid integer"),
    ],
)
def test_overrides_of_keys_that_nothing_reads_are_refused(word, message):
    data = content()
    config = data["hyper_parameters"]["config"]
    config["dataset"] = {"_target_": "segdeconv.data.CamVid", "size": None}
    config["trainer"] = {"max_epochs": 2}
    checkpoint.write(data, Path("overridden.ckpt"))
    with pytest.raises(UsageError, match=re.escape(message)):
        checkpoint.read("overridden.ckpt", overrides=[word])
    checkpoint.read("overridden.ckpt", overrides=["dataset.batch_size=1"])


# Text: class files, configs of runs, sidecars

YAMLS = {
    "apply": f"!!python/object/apply:os.system ['touch {MARKER}']",
    "new": f"!!python/object/new:os.system ['touch {MARKER}']",
    "in a value": f"a: !!python/object/apply:os.system ['touch {MARKER}']\nb: 1",
    "in a key": f"? !!python/object/apply:os.system ['touch {MARKER}']\n: 1",
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_is_read_as_plain_data(name):
    yaml.unsafe_load(YAMLS[name])
    assert fired(), "the payload must run in an unsafe load, or this test proves nothing"
    for sub in ("images", "masks"):
        (Path("mine") / sub).mkdir(parents=True)
        for stem in "ab":
            Image.new("L", (4, 4)).save(Path("mine") / sub / f"{stem}.png")
    Path("mine/classes.yaml").write_text(YAMLS[name])
    with pytest.raises(UsageError, match=r"classes.yaml is not YAML"):
        Folder("train", "mine")
    with pytest.raises(UsageError, match=r"classes.yaml is not YAML"):
        Folder("train", "mine", classes="mine/classes.yaml")
    run = Path("runs/1")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(YAMLS[name])
    (run / "last.ckpt").touch()
    assert find_run({"seed": 0, "resume": "auto"}, Path("new"), Path("runs")) == Path("new")
    with pytest.raises(UsageError, match=r"config.yaml is not the config of a run"):
        open_run(run, {"resume": "auto", "resume_force": False})
    for text in (YAMLS["apply"], f"[{YAMLS['apply']}]", f"{{a: {YAMLS['apply']}}}"):  # text, and lists of text
        assert MARKER in str(override({"a": 1}, [f"a={text}"])["a"])
    assert not fired()


SIDECARS = {
    "empty": b"",
    "of another file": b"0" * 64 + b"  other.ckpt\n",
    "binary": bytes(range(256)),
    "huge": b"#" * 5000,
    "page": b"<html></html>",
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_sidecar_without_the_hash_is_refused(name):
    checkpoint.write(content(), Path("best.ckpt"))
    right = Path("best.ckpt.sha256").read_bytes()
    Path("best.ckpt.sha256").write_bytes(SIDECARS[name] + (right if name == "huge" else b""))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read("best.ckpt")


# Archives


def link_chain(path):
    """Write a tar file for CVE-2025-4517: links so deep that realpath gives up, and a last link that leads outside."""
    deep = "d" * 247
    with tarfile.open(path, "w") as file:
        at = ""
        for letter in "abcdefghijklmnop":
            folder = tarfile.TarInfo(f"{at}{deep}")
            folder.type = tarfile.DIRTYPE
            file.addfile(folder)
            link = tarfile.TarInfo(f"{at}{letter}")
            link.type, link.linkname = tarfile.SYMTYPE, deep
            file.addfile(link)
            at += f"{deep}/"
        long = "/".join("abcdefghijklmnop")
        for name, target in ((f"{long}/{'l' * 254}", "../" * 16), ("escape", f"{long}/{'l' * 254}/..")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            file.addfile(link)
        info = tarfile.TarInfo(f"escape/{MARKER}")
        file.addfile(info, io.BytesIO())


def tar_with(**entry):
    def make(path):
        with tarfile.open(path, "w") as file:
            for name, settings in entry["entries"]:
                info = tarfile.TarInfo(name)
                for key, value in settings.items():
                    setattr(info, key, value)
                file.addfile(info, io.BytesIO(bytes(info.size)))

    return make


ABSOLUTE = "ABSOLUTE"  # stands for the parent folder, which is inserted when the archive is written
TARS = {
    "parent": [(f"../{MARKER}", {})],
    "deeper parent": [("a", {"type": tarfile.DIRTYPE}), (f"a/../../{MARKER}", {})],
    "absolute": [(f"{ABSOLUTE}/{MARKER}", {})],
    "through a link": [("out", {"type": tarfile.SYMTYPE, "linkname": ".."}), (f"out/{MARKER}", {})],
    "through an absolute link": [("out", {"type": tarfile.SYMTYPE, "linkname": ABSOLUTE}), (f"out/{MARKER}", {})],
    "hard link": [("soft", {"type": tarfile.SYMTYPE, "linkname": f"../{MARKER}"}), ("soft", {})],
}


@pytest.mark.parametrize("name", [*TARS, "chain"])
def test_a_tar_writes_nothing_outside_its_folder(name, tmp_path):
    above = str(tmp_path / "place")
    if name == "chain":
        link_chain("evil.tar")
    else:
        entries = [
            (
                path.replace(ABSOLUTE, above),
                {k: v.replace(ABSOLUTE, above) if k == "linkname" else v for k, v in s.items()},
            )
            for path, s in TARS[name]
        ]
        tar_with(entries=entries)(Path("evil.tar"))
    Path("unsafe").mkdir()
    with tarfile.open("evil.tar") as file:
        try:
            file.extractall("unsafe", filter="fully_trusted")
        except OSError:
            assert name == "chain"  # some systems refuse such long names
    assert fired() or name == "chain", "the payload must run in an unsafe extractor, or this test proves nothing"
    with pytest.raises(UsageError, match="do not trust this archive"):
        unpack_tar(Path("evil.tar"), Path("unpacked"))
    assert not fired()
    assert not os.path.lexists("unpacked")


def unzip_unsafely(path, folder):
    """Extract a zip in a simple loop over its entries, as zipfile's own extractall would remove `..`."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            target = Path(folder) / entry.filename
            if stat.S_ISLNK(entry.external_attr >> 16):
                target.symlink_to(file.read(entry).decode())
            else:
                target.write_bytes(file.read(entry))


ZIPS = {
    "parent": [(f"../{MARKER}", b"", 0)],
    "absolute": [(f"{ABSOLUTE}/{MARKER}", b"", 0)],
    "through a link": [("out", b"..", stat.S_IFLNK), (f"out/{MARKER}", b"", 0)],
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_writes_nothing_outside_its_folder(name, tmp_path):
    with zipfile.ZipFile("evil.zip", "w") as file:
        for path, data, kind in ZIPS[name]:
            info = zipfile.ZipInfo(path.replace(ABSOLUTE, str(tmp_path / "place")))
            info.external_attr = ((kind or stat.S_IFREG) | 0o777) << 16
            file.writestr(info, data)
    Path("unsafe").mkdir()
    unzip_unsafely("evil.zip", "unsafe")
    assert fired(), "the payload must run in an unsafe extractor, or this test proves nothing"
    with pytest.raises(UsageError, match="do not trust this archive"):
        unpack_zip(Path("evil.zip"), Path("unpacked"))
    assert not fired()
    assert not os.path.lexists("unpacked")


# Arrays


@pytest.mark.parametrize("form", ["objects", "pickle with a new suffix", "record of objects"])
def test_an_array_of_objects_is_refused(form):
    call = Call(os.system, f"touch {MARKER}")
    if form == "objects":
        np.save("evil.npy", np.array([[call]], dtype=object), allow_pickle=True)
    elif form == "record of objects":
        np.save("evil.npy", np.array([(call,)], dtype=[("a", object)]), allow_pickle=True)
    else:
        Path("evil.npy").write_bytes(pickle.dumps(call))
    np.load("evil.npy", allow_pickle=True)
    assert fired(), "the payload must run in an unsafe load, or this test proves nothing"
    for read in (read_labels, lambda path: read_image(path, channels=1)):
        with pytest.raises(UsageError, match=r"evil\.npy"):
            read(Path("evil.npy"))
    assert not fired()


def test_at_least_forty_payloads_are_tried():
    counts = (len(PICKLES) * len(FORMS), len(CONFIGS), len(YAMLS), len(SIDECARS), len(TARS) + 1, len(ZIPS), 3, 2)
    assert sum(counts) >= 40
    assert len(PICKLES) + sum(counts[1:]) >= 40  # counting each payload in one form only
