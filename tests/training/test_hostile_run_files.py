"""Files of a run folder, of a folder of predictions and of the cache that have another form than ours."""

import contextlib
import json
import time
from pathlib import Path

import fakes
import pytest
import yaml
from hostile_texts import JSONS, YAMLS

from segdeconv.data.datasets.folder import Folder
from segdeconv.data.inspection import cache_folder, inspect
from segdeconv.errors import UsageError
from segdeconv.experiments.study.results import _curve, read_results
from segdeconv.experiments.study.series import cost
from segdeconv.inference.output_folder import PROGRESS_LOG, LocalFolder
from segdeconv.inference.progress_log import ProgressLog, stamp
from segdeconv.training.callbacks import MetricsFile
from segdeconv.training.resume import find_run, finished, read_config

SECONDS = 3.0
GOLDEN = Path(__file__).parents[1] / "golden"
SOME_YAMLS = [YAMLS[name] for name in ("laughs 20", "recursive", "flow 1000", "tag bool", "tag timestamp", "tag binary",
                                       "repeated key", "two documents", "surrogate", "nan", "unclosed")]  # fmt: skip
TYPES = ["[]", "5", "null", '"a"', "true", "{}", '{"complete": "no"}', '{"miou": "high"}', '{"split": 5}', '[{"a": 1}]']


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _soon():
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def put(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("text", [*SOME_YAMLS, "5", "[]", "a", "", "1: 2", "null"])
def test_a_config_or_table_of_another_form_is_refused(text):
    config = put("runs/1/config.yaml", text)
    put("runs/1/last.ckpt", "")
    with pytest.raises(UsageError, match=r"config\.yaml is not the config of a run: it .* - choose another") as one:
        read_config(config.parent)
    assert len(str(one.value).splitlines()) == 1
    assert find_run({"seed": 0, "resume": "auto"}, Path("new"), Path("runs")) == Path("new")
    with pytest.raises(UsageError, match=r"mine\.yaml .* - see docs/results\.md"):
        read_results(put("mine.yaml", text))


@pytest.mark.parametrize(
    "value", ["dataset: 5", "dataset: [1]", "1: 2\ndataset: {}", "dataset: {? 1 : 2, a: 3}", "x: {}"]
)
def test_a_config_with_other_nodes_belongs_to_another_run(value):
    put("runs/1/config.yaml", value)
    put("runs/1/last.ckpt", "")
    config = {"dataset": {"batch_size": 1}, "seed": 0, "resume": "auto"}
    assert find_run(config, Path("new"), Path("runs")) == Path("new")


@pytest.mark.parametrize("text", [*JSONS.values(), *TYPES], ids=lambda text: str(text[:9]))
def test_a_report_of_another_form_is_that_of_an_unfinished_run(text):
    put("run/report.json", text)
    assert finished(Path("run")) == (text == "{}")
    put("run/cost.json", text)
    assert cost(Path("run")) == {}


CURVES = {
    "empty column": "epoch,val/miou\n1,\n",
    "other columns": "a,b\n1,2\n",
    "short row": "epoch,val/miou\n1\n",
    "text": "epoch,val/miou\nx,y\n",
    "long number": f"epoch,val/miou\n{'9' * 5000},0.5\n",
    "long field": f"epoch,val/miou\n{'a' * 200_000},0.5\n",
    "not UTF-8": b"epoch,val/miou\n\xff,\xfe\n",
    "zeros": b"\0" * 10_000,
    "blank lines": "\n\n\n",
    "json": '{"a": 1}\n',
}


@pytest.mark.parametrize("name", CURVES)
def test_metrics_of_another_form_are_refused_or_begun_again(name):
    path = put("metrics.csv", CURVES[name])
    refused = pytest.raises(UsageError, match=r"metrics\.csv is not the table of metrics of a run")
    with contextlib.nullcontext() if name in ("blank lines", "zeros", "json") else refused:
        assert _curve(path) == []
    metrics = MetricsFile(path)
    metrics.cut_back(5)
    assert not path.exists() or name in ("empty column", "other columns")
    metrics.append({"epoch": 6, "val/miou": 0.5})
    assert path.read_text().endswith("6,0.5\n")


# Progress log


def log_lines(folder):
    """Write a log of one image, and return its lines."""
    folder.mkdir(exist_ok=True)
    source = put("photo.png", "x")
    log = ProgressLog(LocalFolder(folder), {"checkpoint": "a"})
    log.add("photo", source, [put(folder / "photo.png", "y")], size=[1, 1], pixels={"a": 1})
    log.close()
    return (folder / PROGRESS_LOG).read_bytes().splitlines(keepends=True)


def changed(line, **changes):
    return json.dumps({**json.loads(line), **changes}).encode() + b"\n"


ENTRIES = [
    {"name": 5}, {"name": None}, {"source": []}, {"source": {"path": "a"}}, {"source": None}, {"files": ["a"]},
    {"files": {"a": "1"}}, {"files": {"a": -1}}, {"files": {"../a": 1}}, {"files": {"/etc/passwd": 1}},
    {"files": {"\0": 1}}, {"pixels": 5}, {"pixels": {"a": 1.5}}, {"size": [1]}, {"size": "ab"}, {"size": [0, 1]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ENTRIES) + len(JSONS) + len(TYPES)))
def test_a_progress_log_is_read_up_to_a_line_of_another_form(number):
    first, entry = log_lines(Path("out"))
    if number < len(ENTRIES):
        hostile = changed(entry, **ENTRIES[number])
    else:
        text = [*JSONS.values(), *TYPES][number - len(ENTRIES)]
        hostile = (text if isinstance(text, bytes) else text.encode()) + b"\n"
    second = changed(entry, name="other")
    put(f"out/{PROGRESS_LOG}", first + second + hostile + entry)
    log = ProgressLog(LocalFolder(Path("out")), {"checkpoint": "a"})
    assert list(log.entries) == ["other"]
    assert (Path("out") / PROGRESS_LOG).read_bytes() == first + second
    log.close()
    put(f"out/{PROGRESS_LOG}", hostile)  # in place of the first line
    log = ProgressLog(LocalFolder(Path("out")), {"checkpoint": "a"})
    log.close()
    assert (Path("out") / PROGRESS_LOG).read_bytes() == first


# Inspection cache


@pytest.fixture
def split(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fakes.folder(tmp_path / "mine")
    return Folder("train", "mine")


def test_a_cached_inspection_of_another_form_is_made_again(split):
    right = inspect(split)
    (path,) = cache_folder("inspections").iterdir()
    content = json.loads(path.read_text())
    hostile = [*JSONS.values(), *TYPES]
    for key, values in {
        "pixels": [[], [1], "ab", None, [-1.5] * len(right.pixels), [[1]]],
        "sizes": [[[1]], 5, [["a", 1, 1]]],
        "mean": [[], [1.0] * 9, ["x"] * 3],
        "largest": [[[99]], [[0]] * 99, [["a"]]],
        "flat": [[99], [-1]],
        "num_images": [99, "a"],
        "values": [[[1, 2]], [[1, 2, 3, 99]], 5],
        "digests": [["a"] * 99, [5]],
    }.items():
        hostile += [json.dumps({**content, key: value}) for value in values]
    hostile.append(json.dumps({key: value for key, value in content.items() if key != "split"}))
    for text in hostile:
        put(path, text)
        assert inspect(split) == right
        assert json.loads(path.read_text()) == content


# Earlier releases


def test_files_of_earlier_versions_are_read():
    folder = GOLDEN / "run-0.1.0"
    assert finished(folder)
    assert read_config(folder)["dataset"]["_target_"] == "segdeconv.data.Shapes"
    assert len(_curve(folder / "metrics.csv")) == 1
    put(f"out/{PROGRESS_LOG}", (folder / PROGRESS_LOG).read_bytes())
    provenance = json.loads((folder / PROGRESS_LOG).read_text().splitlines()[0])
    log = ProgressLog(LocalFolder(Path("out")), provenance)
    assert len(log.entries) == 2
    log.close()
    assert yaml.safe_load((folder / "config.yaml").read_text()) == read_config(folder)
    assert stamp(folder / PROGRESS_LOG).keys() == next(log.sorted())["source"].keys()
