"""`train` as a Python program calls it: with names, keys, classes and objects, and what it returns."""

import csv
import json
import re
from functools import partial
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torchvision.transforms import v2

import segdeconv
from segdeconv.checkpoints import checkpoint
from segdeconv.cli.own_code import compose
from segdeconv.config import choice, public_name
from segdeconv.data.adapter import Adapter, dataset_node
from segdeconv.errors import CheckpointError, SegdeconvError, UsageError
from segdeconv.evaluation.evaluate import Evaluation, restore_dataset
from segdeconv.losses import CrossEntropy, Dice, Focal, LovaszSoftmax, Sum, build_loss, check_loss, loss_sums
from segdeconv.losses.adapter import loss_node
from segdeconv.models import SegNet
from segdeconv.train import train
from segdeconv.training.arguments import read_arguments
from segdeconv.training.autoconfig import KEYS
from segdeconv.training.config_check import check_config

QUICK = {"trainer__max_epochs": 1, "trainer__precision": "32-true", "logger": False, "dataset__num_workers": 0}

NARROW = {"model": SegNet, "model__stages": [[4], [8]]}
ADDITION, CLIPPING = "model.encoder_addition", "trainer.gradient_clip_val"


class Squares(torch.utils.data.Dataset):
    """A bright square on noise, as (3, H, W) floats in 0..1 and (H, W) labels of which -100 is ignored."""

    def __init__(self, count=8, *, seed=0, change=lambda item: item):
        self.count, self.seed, self.change = count, seed, change

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        random = np.random.default_rng([self.seed, index])
        row, column = random.integers(4, 16, 2)
        mask = np.zeros((32, 32), np.int64)
        mask[row : row + 12, column : column + 12], mask[0] = 1, -100
        image = torch.from_numpy(0.3 * random.random((3, 32, 32)) + 0.5 * (mask == 1)).float()
        return self.change((image, torch.from_numpy(mask)))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 8, 8), torch.zeros(8, 8)


class Net(nn.Module):
    """Scores of half the resolution in a mapping, as torchvision's networks return them."""

    def __init__(self, outputs=2, channels=3, key="out"):
        super().__init__()
        self.key, self.first = key, nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.last = nn.Conv2d(4, outputs, 1)

    def forward(self, image):
        return {self.key: self.last(self.first(image).relu())}


def objects():
    torch.manual_seed(0)
    network = Net()
    return {
        "dataset": (Squares(), Squares(4, seed=1)),
        "model": network,
        "loss": nn.CrossEntropyLoss(),  # which ignores -100, and not 255
        "optimizer": torch.optim.SGD([{"params": network.parameters(), "lr": 0.5}], lr=0.1),
        "dataset__classes": ["noise", "square"],
        "dataset__batch_size": 4,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the result of a run with objects, the objects, and the network before training."""
    given = objects()
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    return train(run=tmp_path_factory.mktemp("objects") / "run", **given, **QUICK), given, before


def test_the_result_has_the_scores_and_files_of_the_run(trained):
    result, _, _ = trained
    report = json.loads((result.folder / "report.json").read_text())
    with (result.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert result.scores["miou"] == report["miou"]
    assert [row["val/miou"] for row in result.history] == [float(row["val/miou"]) for row in rows]
    assert result.best_checkpoint == result.folder / "best.ckpt"
    shown = repr(result)
    assert f"mIoU {100 * report['miou']:.1f} %" in shown
    assert str(result.best_checkpoint) in shown


def test_a_data_set_of_the_program_is_scored_and_its_training_images_are_counted(trained):
    result, given, _ = trained
    train_set, val_set = given["dataset"]
    assert Evaluation.of(result.segmenter, val_set).report()["miou"] == result.scores["miou"]
    items = [train_set[0], *(Squares(5, seed=9)[index] for index in range(5))]
    evaluation = Evaluation.of(result.segmenter, items)
    expected = np.zeros((2, 2), np.int64)
    for image, mask in items:
        predicted = result.segmenter.predict(image).mask
        np.add.at(expected, (mask[mask >= 0], predicted[mask >= 0]), 1)
    assert np.array_equal(evaluation.confusion, expected)
    assert evaluation.report()["images_trained_on"] == 1
    assert "6 images of test, so the scores are rough. The network was trained on 1 of them" in str(
        evaluation.verdict()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, mask: (image, mask + 1), "a mask has label 2, but there are 2 classes"),
        (lambda image, mask: (image[:1], mask), "trained on images with 3 channel(s), but the data set has 1 - give"),
    ],
)
def test_a_data_set_that_does_not_fit_the_network_is_refused(trained, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Evaluation.of(trained[0].segmenter, [change(*Squares()[0])])


def test_objects_are_copied_and_the_same_call_gives_the_same_bits(trained, tmp_path, capsys):
    result, given, before = trained
    after = given["model"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = train(run=tmp_path / "again", **given, **QUICK)
    first, second = result.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(result.model.network.last.weight, before["last.weight"])
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("dataset (test_python_api.Squares), model (test_python_api.Net), loss (torch.nn.")
    assert first_line.endswith("to load the checkpoint, segdeconv.load(CHECKPOINT, model=NETWORK)")
    assert "hydra" not in first_line


def test_a_logger_of_the_program_gets_the_scores(tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    result = train(run=tmp_path / "run", **pair(), **NARROW, **{**QUICK, "logger": logger})
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["val/miou"]) for row in csv.DictReader(file) if row["val/miou"]]
    assert logged == pytest.approx([row["val/miou"] for row in result.history])


def test_the_random_numbers_of_the_program_go_on(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    train(run=tmp_path / "run", **pair(), **NARROW, **QUICK)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_a_run_of_objects_resumes_to_the_bit(trained, tmp_path):
    result, given, _ = trained
    run = tmp_path / "run"
    stopped = train(run=run, **given, **QUICK, trainer__max_steps=1)
    assert [row["step"] for row in stopped.history] == [1.0]
    resumed = train(run=run, **given, **QUICK, resume="auto", trainer__max_steps=2)
    first, second = (one.checkpoint.weights for one in (result, resumed))
    assert result.history[0]["step"] == resumed.history[-1]["step"] == 2.0
    last = [checkpoint.load_plain(one.folder / "last.ckpt")["state_dict"] for one in (result, resumed)]
    assert first.keys() == second.keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_the_optimizer_object_updates_the_copy_with_its_own_learning_rate(tmp_path):
    """One step of SGD, computed by torch alone."""
    given = objects()
    squares = [Squares()[index] for index in range(8)]
    images = torch.stack([(255 * image).round() for image, _ in squares])
    mean, std = (torch.tensor(values)[:, None, None] for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    masks = torch.stack([mask for _, mask in squares])
    network = given["model"]
    expected = Net()
    expected.load_state_dict(network.state_dict())
    scores = nn.functional.interpolate(expected((images - mean) / std)["out"], (32, 32), mode="bilinear")
    nn.functional.cross_entropy(scores, masks, ignore_index=-100).backward()
    given |= {"dataset__batch_size": 8, "augment": {}, "schedule": "constant"}
    result = train(run=tmp_path / "run", **given, **QUICK)
    for (name, old), new in zip(expected.named_parameters(), result.model.network.parameters(), strict=True):
        assert torch.allclose(new, old - 0.5 * old.grad, atol=1e-5), name


def test_a_checkpoint_of_a_network_object_needs_such_a_network(trained):
    result, _, _ = trained
    image = np.random.default_rng(0).integers(0, 255, (37, 41, 3), np.uint8)
    expected = result.segmenter.predict(image).mask
    assert np.array_equal(segdeconv.load(result.folder, model=Net()).predict(image).mask, expected)
    with pytest.raises(CheckpointError, match=r"network object \(test_python_api.Net\).*load\(CHECKPOINT, model="):
        segdeconv.load(result.folder)
    with pytest.raises(CheckpointError, match="does not contain the weights"):
        segdeconv.load(result.folder, model=Net(outputs=3))
    read = checkpoint.read(result.best_checkpoint)
    with pytest.raises(UsageError, match="Squares was an object of a Python program"):
        restore_dataset(read, "val")


def test_a_network_of_segdeconv_is_described_by_the_config(tmp_path, capsys):
    network = SegNet(2, stages=[[4], [8]])
    given = {"dataset": Squares(), "dataset__batch_size": 2, "augment": PIPELINE, **QUICK}
    result = train(model=network, run=tmp_path / "run", **given)
    config = checkpoint.read(result.best_checkpoint).config
    node = config["model"]
    assert (node["_target_"], node["stages"]) == ("segdeconv.models.SegNet", [[4], [8]])
    assert config["augment"] == PIPELINE_NODES
    assert segdeconv.load(result.folder).classes.names == ("class_0", "class_1")
    out = capsys.readouterr().out
    assert "model" not in out.splitlines()[0]
    assert "val: 1 of the 8 items, drawn at random - give (train, val) to choose" in out or "val: 2 of" in out


def test_names_and_keys_give_the_config_of_the_command_line():
    words = [
        "model=unet",
        "loss=ce_dice",
        "loss.parts.dice.factor=0.5",
        "dataset=camvid",
        "dataset.root=d",
        "seed=3",
    ]
    expected = check_config(compose(words)[0])
    arguments = read_arguments(
        {"model": "unet", "dataset": {**choice("dataset", "camvid"), "root": Path("d")}},
        {"loss": "ce_dice", "loss__parts__dice__factor": np.float64(0.5), "seed": 3},
    )
    assert check_config(arguments.config) == expected
    assert arguments.name == "camvid-unet"


def test_the_folder_data_set_is_configured_automatically_as_on_the_command_line():
    keys = {"dataset__root": "mine", "dataset__size": [64, 64], "trainer__max_steps": 5}
    auto = read_arguments({"model": {"_target_": "segdeconv.models.UNet", "width": 0.5}}, {"dataset": "folder", **keys})
    left_out = {key for key in KEYS if key not in auto.config["auto"]}
    assert {"dataset.size", "trainer.max_epochs", "model.width"} <= left_out
    assert "augment" in auto.config["auto"]


@pytest.mark.parametrize(
    "change", [Tensor.float, lambda mask: mask[None].double(), lambda mask: mask[..., None].numpy()]
)
def test_masks_of_whole_numbers_have_the_labels_of_integers(change):
    expected = [sample.mask for sample in Adapter(Squares(2), "val")]
    changed = Adapter(Squares(2, change=lambda item: (item[0], change(item[1]))), "val")
    assert all(np.array_equal(sample.mask, mask) for sample, mask in zip(changed, expected, strict=True))


@pytest.mark.parametrize(
    "classes",
    [
        ["sky", "road"],
        {0: "sky", 1: "road"},
        {"1": "road", "0": "sky"},
        {"road": 1, "sky": 0, "ignore": 255},
        "names.txt",
    ],
)
def test_classes_of_a_data_set_are_named_in_every_form(classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("sky\nroad\n")
    node = check_config(read_arguments({}, {"dataset": Squares(), "dataset__classes": classes}).config)["dataset"]
    given = dataset_node(Squares())["_target_"](split="train", classes=node["classes"]).classes
    assert (given.names, given.labels, given.ignore_index) == (("sky", "road"), (0, 1), 255)


@pytest.mark.parametrize("form", [tuple, list])
def test_the_same_data_set_twice_is_not_split(form, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("segdeconv.errors._warned", set())
    squares = Squares(5)
    result = train(dataset=form([squares, squares]), run=tmp_path / "run", **NARROW, dataset__batch_size=5, **QUICK)
    printed, warned = capsys.readouterr()
    assert "train and val are the same data set, so scores on val show" in warned
    assert "drawn at random" not in printed
    node = dataset_node(form([squares, squares]))["_target_"]
    samples = [[node(split=split)[index].image for index in range(5)] for split in ("train", "val")]
    assert all(np.array_equal(*pair) for pair in zip(*samples, strict=True))
    assert result.scores["miou"] > 0


class WithoutFiles(Squares):
    """The items of Squares in place of the files of a data set of torchvision."""

    __init__ = Squares.__init__


class Pets(WithoutFiles, torchvision.datasets.OxfordIIITPet):
    """torchvision sets the breeds, as its own constructor does."""

    def __init__(self):
        super().__init__()
        self.classes = ["Bombay", "Beagle", "Pug"]


class Streets(WithoutFiles, torchvision.datasets.Cityscapes):
    pass


class Digits(WithoutFiles, torchvision.datasets.MNIST):
    pass


class OwnStreets(Streets):
    classes = ("road", "car")


class OwnVision(WithoutFiles, torchvision.datasets.VisionDataset):
    classes = np.array(["road", "car"])


class Numbered(Squares):
    classes = 2


class Pairs(Squares):
    classes = (("road", 0), ("car", 1))


NUMBERED = ("class_0", "class_1")
ROAD = ("road", "car")


@pytest.mark.parametrize(
    ("dataset", "names"),
    [(Pets(), NUMBERED), (Digits(), NUMBERED), (OwnStreets(), ROAD), (OwnVision(), ROAD), (Numbered(), NUMBERED),
     (Pairs(), NUMBERED)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_only_names_of_pixels_in_a_data_set_become_its_classes(dataset, names):
    classes = dataset_node(dataset)["_target_"](split="train").classes
    assert (classes.names, classes.labels) == (names, (0, 1))


def test_classes_with_ids_are_named_by_these():
    classes = dataset_node(Streets())["_target_"](split="train").classes
    assert classes.labels == tuple(range(34))
    assert [classes.names[label] for label in (0, 7, 26, 33)] == ["unlabeled", "road", "car", "bicycle"]
    assert "license plate" not in classes.names


@pytest.mark.parametrize("form", [tuple, list, lambda item: {"image": item[0], "mask": item[1]}])
def test_a_list_of_items_is_one_data_set(form):
    given = [form(item) for item in map(Squares(8).__getitem__, range(8))]
    node = dataset_node(given)
    train, val = (node["_target_"](split=split) for split in ("train", "val"))
    assert len(train) + len(val) == 8
    assert len(val) in (1, 2)


PIPELINE = A.Compose(
    [A.HorizontalFlip(p=0.3), A.OneOf([A.RandomGamma(gamma_limit=(60, 150)), A.Blur(p=1)]), A.HorizontalFlip()]
)
PIPELINE_NODES = {
    "HorizontalFlip": {"_target_": "albumentations.HorizontalFlip", "p": 0.3},
    "OneOf": {
        "_target_": "albumentations.OneOf",
        "transforms": [
            {"_target_": "albumentations.RandomGamma", "gamma_limit": [60, 150]},
            {"_target_": "albumentations.Blur", "p": 1},
        ],
    },
    "HorizontalFlip_2": {"_target_": "albumentations.HorizontalFlip"},
}
BLUR = {"_target_": "albumentations.Blur"}


class Darker(A.ImageOnlyTransform):
    def __init__(self, factor=0.5, p=1.0):
        super().__init__(p=p)
        self.factor = factor

    def apply(self, img, **_):
        return (img * self.factor).astype(img.dtype)


class Hiding(Darker):
    def __init__(self, factor=0.5, p=1.0):
        super().__init__(factor=factor, p=p)
        self.hidden = self.__dict__.pop("factor")


@pytest.mark.parametrize(
    ("given", "nodes"),
    [
        (PIPELINE, PIPELINE_NODES),
        (list(PIPELINE.transforms), PIPELINE_NODES),
        (
            A.Compose([A.Blur()], p=0.5),
            {"Compose": {"_target_": "albumentations.Compose", "p": 0.5, "transforms": [BLUR]}},
        ),
        (A.Blur(), {"Blur": BLUR}),
        (A.Blur, {"Blur": BLUR}),
        (BLUR, {"Blur": BLUR}),
        (partial(A.Blur, blur_limit=5), {"Blur": {**BLUR, "blur_limit": 5}}),
        ({"soft": A.Blur(), "none": None}, {"soft": BLUR}),
        ([A.Blur(), "flip"], {"Blur": BLUR, **choice("augment", "flip")}),
        (["flip", A.Blur()], {**choice("augment", "flip"), "Blur": BLUR}),
        (Darker(0.25), {"Darker": {"_target_": "test_python_api.Darker", "factor": 0.25}}),
        ("none", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_transforms_of_albumentations_are_described_by_the_config(given, nodes):
    checked = check_config(read_arguments({}, {"augment": given}).config)["augment"]
    assert (checked, list(checked)) == (nodes, list(nodes))


def test_an_argument_that_a_transform_does_not_describe_is_refused():
    with pytest.raises(UsageError, match=r"no config can describe test_python_api\.Hiding, because of its attribute"):
        read_arguments({}, {"augment": A.OneOf([A.Blur(), Hiding(0.25)])})


FLIP = {"flip": {"_target_": "albumentations.VerticalFlip"}}
GIVEN = {
    "nodes": ("augment", FLIP, ["augment"]),
    "no nodes": ("augment", {}, ["augment"]),
    "a class": ("optimizer", torch.optim.RMSprop, ["optimizer"]),
    "a partial class": ("model", partial(SegNet, width=0.5, encoder_addition=False), [ADDITION, "model.width"]),
    "a node": ("schedule", {"_target_": "segdeconv.optimization.Constant"}, ["schedule"]),
    "keys": ("trainer", {"max_steps": 5, "gradient_clip_val": None}, [CLIPPING, "trainer.max_epochs"]),
    "a name": ("optimizer", "adamw", ["optimizer"]),
    "a network by name": ("model", "unet", []),
}


@pytest.mark.parametrize("how", ["a keyword", "the config"])
@pytest.mark.parametrize("form", GIVEN)
def test_what_is_given_for_the_folder_data_set_is_not_chosen_again(form, how):
    group, value, keys = GIVEN[form]
    given = {"dataset": "folder", group: value}
    arguments = read_arguments(*((given, {}) if how == "the config" else ({}, given)))
    assert [key for key in KEYS if key not in arguments.config["auto"]] == keys


def pair(change=lambda item: item):
    return {"dataset": (Squares(change=change), Squares(2, change=change)), "dataset__batch_size": 2}


MISTAKES = {
    "module": ({"model": torchvision.models}, "model is the module torchvision.models - give the name of a file in"),
    "name of a module": ({"model": {"_target_": "torchvision.models"}}, "is not a class or function"),
    "unknown name": ({"model": "segnt"}, "unknown model 'segnt' - did you mean 'segnet'?"),
    "a folder": ({"dataset": Path(__file__).parent}, "in it, dataset='folder', dataset__root="),
    "a loader": ({"dataset": torch.utils.data.DataLoader(Squares())}, "(of a DataLoader, its .dataset)"),
    "key of a network object": (
        {"model": Net(), "model__key": "logits"}, "model.key has no effect on the Net object that is given as model",
    ),
    "key of a network object of segdeconv": (
        {"model": SegNet(2, stages=[[4]]), "model__stages": [[8]]}, "build it with this value, or give its class",
    ),
    "arguments without names": (
        {"optimizer": partial(torch.optim.SGD, None, 0.1)}, "optimizer is a partial with arguments that have no name",
    ),
    "two loggers": ({"logger": [CSVLogger("a"), CSVLogger("b")]}, "logger is of type list - give the name of a file"),
    "an experiment": ({"experiment": "demo"}, "experiment is a key of the command line, where Hydra puts its file"),
    "unknown key of an object": (
        {**pair(), "dataset__num_classes": 2}, "dataset is an object of test_python_api.Squares, which has been built",
    ),
    "unknown key": ({"model__widht": 1}, "unknown key model.widht - did you mean 'width'?"),
    "unknown group": ({"modle": "unet"}, "unknown key modle - did you mean 'model'?"),
    "twice": ({"config": {"model": "unet"}, "model": "fcn"}, "model is given twice"),
    "number": ({"model": 5}, "of type int - give the name of a file in configs/model, a class or a torch.nn.Module"),
    "trainer object": ({"trainer": object()}, "trainer is of type object - give the name"),
    "local class": ({"model": type("Local", (nn.Module,), {"__qualname__": "f.Local"})}, "defined in a function"),
    "optimizer without its network": ({"optimizer": torch.optim.SGD(Net().parameters(), 0.1)}, "of another network"),
    "class of a torch data set": ({"dataset": Squares}, "is not a segdeconv.data.SegmentationDataset"),
    "class of a torch data set in a pair": ({"dataset": (Squares, Squares)}, "train is the class Squares"),
    "endless data set": ({"dataset": Endless()}, "train is of type test_python_api.Endless, which has no length"),
    "three data sets": ({"dataset": (Squares(), Squares(), Squares())}, "dataset has 3 data sets"),
    "transforms of torchvision": ({"augment": v2.Compose([v2.RandomHorizontalFlip()])}, "augment is of type torchvi"),
    "a number as a transform": ({"augment": {"flip": 3}}, "give transforms of albumentations, or the name of a file"),
    "normalised twice": ({**pair(), "augment": A.Compose([A.Normalize()])}, "dataset.std normalise them after it - l"),
    "a function as a transform": ({"augment": A.Lambda(name="f", image=len)}, "no config can describe albumentations"),
    "seeded transforms": ({"augment": A.Compose([A.Blur()], seed=3)}, "seed has no effect: the seed of the run"),
    "text": ({"dataset": ("train", "val")}, "is of type str, not a pair (image, mask)"),
    "empty": ({"dataset": (Squares(0), Squares())}, "the train data set has no items"),
    "no pairs": (pair(lambda item: item[0]), "train_0 is of type Tensor, not a pair (image, mask)"),
    "other keys": (
        pair(lambda item: {"image": item[0], "label": item[1]}),
        "train_0 is of type dict with the keys image, label, not a pair (image, mask)",
    ),
    "splits by name": (
        {"dataset": {"train": Squares(), "validation": Squares(2)}},
        "dataset has the data sets train, validation - give two of them, such as (data['train'], data['validation'])",
    ),
    "a gap in the classes": (
        {**pair(), "dataset__classes": {0: "sky", 2: "road"}}, "sky, road must have the labels 0..1, and ignore 255",
    ),
    "another ignored label": (
        {**pair(), "dataset__classes": {"sky": 0, "road": 1, "ignore": 2}}, "must have the labels 0..1, and ignore 255",
    ),
    "0 and 255": (pair(lambda item: (item[0], (item[1] > 0) * 255)), "no labels but 0 and 255, and 255 marks pixels"),
    "fractions": (pair(lambda item: (item[0], item[1] / 255)), "has shape (32, 32) and float32 values"),
    "normalised": (pair(lambda item: (item[0] - 0.5, item[1])), "but floats must be in 0..1"),
    "one-hot masks": (pair(lambda item: (item[0], torch.zeros(2, 32, 32))), "has shape (2, 32, 32) and float32 values"),
    "other size": (pair(lambda item: (item[0], item[1][:9])), "the mask of train_0 has shape (9, 32)"),
    "label too large": (
        {**pair(lambda item: (item[0], item[1] + 3)), "dataset__classes": ["a", "b"]},
        "a mask has label 4, but there are 2 classes",
    ),
    "one class": (pair(lambda item: (item[0], item[1] * 0)), "a network needs at least two classes"),
    "network for other classes": ({**pair(), "model": Net(outputs=5)}, "scores for 5 classes"),
    "own network for other classes": ({**pair(), "model": SegNet(5, stages=[[4]])}, "is for 5 classes"),
    "network for other channels": ({**pair(), "model": Net(channels=4)}, "model (Net) fails: "),
    "network without scores": ({**pair(), "model": Net(key="masks")}, "returns no (N, classes, H, W)"),
    "loss of another form": ({**pair(), **NARROW, "loss": nn.BCEWithLogitsLoss()}, "loss (BCEWithLogits"),
    "loss of each pixel": (
        {**pair(), **NARROW, "loss": nn.CrossEntropyLoss(reduction="none")},
        "loss (CrossEntropyLoss) returns (2, 32, 32), not a scalar",
    ),
    "weights of a loss object": (
        {**pair(), **NARROW, "loss": nn.CrossEntropyLoss(), "loss__class_weighting": "median_frequency"},
        "leave out loss.class_weighting",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mistake, tmp_path):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(SegdeconvError) as caught:
        train(run=tmp_path / "run", **{**QUICK, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hydra" not in str(caught.value)


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
def test_an_error_in_the_programs_own_data_set_is_raised_as_it_is(kind, tmp_path):
    def fail(item):
        raise kind("a mistake of the program")

    with pytest.raises(kind, match=r"^a mistake of the program$"):
        train(run=tmp_path / "run", **pair(fail), **QUICK)


def test_messages_of_a_run_folder_name_no_key_of_the_command_line(trained):
    result, given, _ = trained
    with pytest.raises(UsageError, match="resume it with resume=auto or choose another run folder"):
        train(run=result.folder, **given, **QUICK)


@pytest.mark.parametrize(
    "change",
    [
        lambda image, mask: (image, mask),
        lambda image, mask: {"image": image, "mask": mask, "other": 1},
        lambda image, mask: (Image.fromarray(np.asarray(image)), Image.fromarray(np.asarray(mask).astype(np.uint8))),
        lambda image, mask: (torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None]),
        lambda image, mask: ((image / 255).astype(np.float32), mask.astype(np.uint8)),
        lambda image, mask: (image, torch.from_numpy(mask).bfloat16()),
        lambda image, mask: (image, mask.astype(">u2")),
    ],
    ids=["arrays", "mapping", "Pillow", "tensors", "fractions", "bfloat16 mask", "big-endian mask"],
)
def test_the_forms_of_items_are_the_same_sample(change):
    random = np.random.default_rng(0)
    image, mask = random.integers(0, 256, (9, 12, 3), np.uint8), random.integers(0, 3, (9, 12))
    sample = Adapter([change(image, mask)], "train")[0]
    assert np.array_equal(sample.image, image)
    assert np.array_equal(sample.mask, mask)
    assert sample.mask.dtype == np.uint8


def palette_image(mask):
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    return image


MASK_FILES = {
    "grey.png": lambda mask, path: Image.fromarray(mask.astype(np.uint8)).save(path),
    "palette.png": lambda mask, path: palette_image(mask).save(path),
    "16-bit.png": lambda mask, path: Image.fromarray(mask.astype(np.uint16)).save(path),
    "float.tif": lambda mask, path: Image.fromarray(mask.astype(np.float32)).save(path),
    "int.npy": lambda mask, path: np.save(path, mask),
}
IMAGE_FILES = {
    "rgb.png": lambda image, path: Image.fromarray(image).save(path),
    "rgb.tif": lambda image, path: Image.fromarray(image).save(path),
    "rgb.npy": lambda image, path: np.save(path, image),
}


@pytest.mark.parametrize("path_type", [str, Path])
@pytest.mark.parametrize(
    ("image_name", "mask_name"), [*((name, "grey.png") for name in IMAGE_FILES), *(("rgb.png", m) for m in MASK_FILES)]
)
def test_items_of_paths_are_the_samples_of_their_files(path_type, image_name, mask_name, tmp_path):
    random, items, expected = np.random.default_rng(0), [], []
    for index in range(3):
        image, mask = random.integers(0, 256, (9, 12, 3), np.uint8), random.integers(0, 3, (9, 12))
        mask[0, :3] = 0, 1, 2
        paths = tmp_path / f"{index}_{image_name}", tmp_path / f"{index}_mask_{mask_name}"
        IMAGE_FILES[image_name](image, paths[0])
        MASK_FILES[mask_name](mask, paths[1])
        items.append(tuple(map(path_type, paths)))
        expected.append((image, mask))
    node = dataset_node(items)["_target_"]
    splits = {split: node(split=split) for split in ("train", "val")}
    for dataset in splits.values():
        for index, sample in zip(dataset.indices, dataset, strict=True):
            assert np.array_equal(sample.image, expected[index][0])
            assert np.array_equal(sample.mask, expected[index][1])
    assert sorted(index for dataset in splits.values() for index in dataset.indices) == [0, 1, 2]


def test_the_nodata_value_of_a_mask_file_is_ignored(tmp_path):
    import tifffile

    mask = np.array([[0, 1, 65535], [65535, 1, 0]], np.uint16)
    tifffile.imwrite(tmp_path / "mask.tif", mask, extratags=[(42113, "s", 0, "65535", True)])
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "image.png")
    sample = Adapter([(tmp_path / "image.png", tmp_path / "mask.tif")], "train")[0]
    assert sample.mask.tolist() == [[0, 1, 255], [255, 1, 0]]


def rotated(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


WRONG_PATHS = {
    "missing": (lambda image, path: None, "a.png is missing - restore the file"),
    "rotated": (rotated, "a.png is stored rotated (EXIF orientation 6) and its mask may or may not be - give images"),
    "another size": (
        lambda image, path: image.crop((0, 0, 5, 5)).save(path),
        "train_0 has shape (9, 9) (H, W) and its",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_PATHS)
def test_a_path_without_a_fitting_image_gets_one_line(wrong, tmp_path):
    write, message = WRONG_PATHS[wrong]
    write(Image.new("RGB", (9, 9)), tmp_path / "a.png")
    with pytest.raises(UsageError) as caught:
        Adapter([(str(tmp_path / "a.png"), np.zeros((9, 9), np.uint8))], "train")
    assert message in str(caught.value)


def test_a_mask_file_of_colours_is_refused(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match=r"the mask of train_0 has shape \(9, 9, 3\) and uint8 values - give class in"):
        Adapter([(np.zeros((9, 9, 3), np.uint8), tmp_path / "mask.png")], "train")


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("channels", [1, 2, 5, 32])
def test_the_mask_decides_whether_the_channels_of_an_image_are_first(channels, form):
    image = np.random.default_rng(0).integers(0, 256, (9, 12, channels), np.uint8)
    mask = np.zeros((9, 12), np.int64)
    for stored in (image, image.transpose(2, 0, 1)):
        assert np.array_equal(Adapter([(form(stored), mask)], "train")[0].image, image)
    with pytest.raises(UsageError, match=rf"has shape \(9, 12\) \(H, W\) and its image \({channels}, 10, 12\) - give"):
        Adapter([(form(np.zeros((channels, 10, 12), np.uint8)), mask)], "train")


def test_a_data_set_that_gives_other_pixels_each_time_is_reported(capsys):
    class Random:
        classes = ("a", "b")

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.random.default_rng().integers(0, 255, (9, 9, 3), np.uint8), np.eye(9, dtype=np.uint8)

    Adapter(Random(), "train")
    assert "gives other pixels each time it is read, so no run can be reproduced" in capsys.readouterr().err


CE = {"ce": {"_target_": "segdeconv.losses.CrossEntropy"}}


@pytest.mark.parametrize("own", [-100, 3, 255])
@pytest.mark.parametrize(
    "kind", [nn.CrossEntropyLoss, CrossEntropy, Focal, Dice, LovaszSoftmax, partial(Sum, parts=CE)]
)
def test_ignored_pixels_get_the_index_that_a_loss_ignores(kind, own):
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    mask[:, 0] = 255
    loss = loss_node(kind(ignore_index=own))["_target_"](ignore_index=255)
    assert torch.equal(loss(logits, mask), kind(ignore_index=255)(logits, mask))
    total, normaliser = loss_sums(loss, logits, mask)
    assert (total / normaliser).item() == pytest.approx(loss(logits, mask).item())


class Tempered(CrossEntropy):
    """A loss with learnable parameters."""

    def __init__(self, *, trained: bool = True, ignore_index: int = 255) -> None:
        super().__init__(ignore_index=ignore_index)
        self.temperature = nn.Parameter(torch.ones(2), requires_grad=trained)


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_learnable_parameters_of_a_loss_are_reported_as_untrained(as_object, trained, capsys, monkeypatch):
    monkeypatch.setattr("segdeconv.errors._warned", set())
    node = (
        loss_node(Tempered(trained=trained)) if as_object else {"_target_": public_name(Tempered), "trained": trained}
    )
    build_loss(check_loss(node), class_weights=None, ignore_index=255)
    message = "Tempered) has 2 learnable parameters, which keep their values: only those of the network are trained"
    assert (message in capsys.readouterr().err) == trained
