"""Parts of a prediction or an evaluation, --shard K/N, and their merge, compared with one process."""

import json
import shutil

import fakes
import numpy as np
import pytest
from PIL import Image

from segdeconv.errors import UsageError
from segdeconv.inference import distributed
from segdeconv.inference.parts import PARTS, Part

DATA = {"_target_": "segdeconv.data.Shapes", "num_train": 2, "num_val": 7, "batch_size": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two networks, and images of which one is damaged."""
    folder = tmp_path_factory.mktemp("place")
    fakes.untrained(folder / "a.ckpt", DATA)
    fakes.untrained(folder / "b.ckpt", {**DATA, "num_train": 3})
    random = np.random.default_rng(0)
    for name in ("a", "b", "deep/c", "deep/d", "e"):
        path = folder / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (folder / "photos" / "broken.png").write_bytes(b"no image")
    return folder


def contents(folder, *without):
    """Return the bytes of every file, and the lines of the progress log, whose order depends on the parts."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {name: content for name, content in found.items() if not name.startswith((".segdeconv-files", *without))}
    return {name: sorted(content.splitlines()) if name.endswith("l") else content for name, content in found.items()}


def predict(commands, place, cwd, *words, checkpoint="a.ckpt", photos="photos", out="parts"):
    words = (place / checkpoint, place / photos, "--out", out, "--polygons", *words)
    return commands("predict", *words, cwd=cwd)


def predict_parts(commands, place, cwd, count=3):
    for index in reversed(range(1, count + 1)):
        done = predict(commands, place, cwd, "--shard", f"{index}/{count}")
        assert done.code in (0, 2), done.err


def test_parts_of_a_prediction_are_merged_to_that_of_one_process(place, commands, tmp_path):
    one = predict(commands, place, tmp_path, out="one")
    assert one.code == 2
    predict_parts(commands, place, tmp_path)
    assert not (tmp_path / "parts" / "statistics.csv").exists()
    kept = shutil.copytree(tmp_path / "parts" / PARTS, tmp_path / "kept")
    whole = contents(tmp_path / "one")
    for _ in range(2):
        merged = commands("merge", "parts", cwd=tmp_path)
        assert (merged.code, merged.error_message) == (2, one.error_message), merged.err
        assert merged.out.count("skipped: ") == 1
        assert "5 masks of 3 parts in parts, with statistics.csv and regions.json" in merged.out
        assert contents(tmp_path / "parts") == whole
        shutil.copytree(kept, tmp_path / "parts" / PARTS)  # as if the merge had been killed before the end
    shutil.rmtree(tmp_path / "parts" / PARTS)
    resumed = predict(commands, place, tmp_path)
    assert "5 of 6 are already done and skipped" in resumed.out, resumed.err
    assert contents(tmp_path / "parts") == whole


def test_a_part_is_resumed(place, commands, tmp_path):
    predict_parts(commands, place, tmp_path, count=1)
    log = tmp_path / "parts" / PARTS / "1-of-1" / "predictions.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) * 2 // 3])
    again = predict(commands, place, tmp_path, "--shard", "1/1")
    assert "are already done and skipped" in again.out
    assert sorted(log.read_bytes().splitlines()) == sorted(whole.splitlines())


def _remove_part(out):
    shutil.rmtree(out / PARTS / "2-of-3")


def _interrupt(out):
    (out / PARTS / "2-of-3" / "part.json").unlink()


def _remove_mask(out):
    (out / "b.png").unlink()


def _cut_log(out):
    log = out / PARTS / "1-of-3" / "predictions.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))


def _change_summary(out):
    (out / PARTS / "3-of-3" / "part.json").write_text('{"kind": "predict"}')


def _damage_summary(out):
    (out / PARTS / "3-of-3" / "part.json").write_text("{")


def _change_setting(out):
    log = out / PARTS / "2-of-3" / "predictions.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"flip": false', b'"flip": true'))


def _change_images(out):
    log = out / PARTS / "2-of-3" / "predictions.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"images": 6', b'"images": 7'))


def _change_checkpoint(out):
    log = out / PARTS / "2-of-3" / "predictions.jsonl"
    log.write_bytes(log.read_bytes().replace(b'{"checkpoint": "', b'{"checkpoint": "0'))


def _own_table(out):
    (out / "statistics.csv").write_text("mine")


@pytest.fixture(scope="module")
def parts(place, commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    predict_parts(commands, place, folder)
    return folder / "parts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove_part, "lacks part 2/3 - run the command with --shard for each of them"),
        (_interrupt, "part 2/3 not finished - run the same command again"),
        (_remove_mask, "b.png of part 2/3 is missing or has changed - run this part again"),
        (_cut_log, "part 1/3 has 1 of 2 images, and 0 could not be read - run it again"),
        (_change_summary, "part 3/3 has a damaged part.json - run it again"),
        (_damage_summary, "run part 3/3 again"),
        (_change_setting, "part 2/3 has predictions made with flip=False, not True than part 1/3"),
        (_change_images, "part 2/3 has predictions of other images than part 1/3"),
        (_change_checkpoint, "part 2/3 has predictions of a different checkpoint than part 1/3"),
        (_own_table, "statistics.csv exists and was not written by segdeconv"),
    ],
)
def test_a_merge_of_wrong_parts_is_refused_and_writes_nothing(parts, commands, tmp_path, change, message):
    out = shutil.copytree(parts, tmp_path / "out")
    change(out)
    before = contents(out)
    done = commands("merge", "out", cwd=tmp_path)
    assert done.code == 2
    assert message in done.error_message
    assert contents(out, ".lock") == before


def test_options_of_parts_that_contradict_each_other_are_refused(place, parts, commands, tmp_path):
    out = shutil.copytree(parts, tmp_path / "parts")
    for words, message in (
        (("--shard", "0/3"), "--shard=0/3 is not a part - write K/N"),
        (("--shard", "third"), "--shard=third is not a part"),
        (("--shard", "1/3", "--engine", "ray"), "leave out one of them"),
        (("--shard", "1/3", "--submission", "voc"), "--submission needs the images of all parts"),
        (("--shard", "1/3", "--verify-tiling"), "--verify-tiling runs in this process"),
        (("--shard", "1/4"), "parts has parts of --shard K/3, not K/4"),
        (("--shard", "1/3", "--flip"), "flip=False, not True - choose another --out, or add --overwrite"),
        (("--workers", "3"), "--workers has no effect without --engine ray - add it"),
        (("--engine", "ray", "--workers", "0"), "--workers=0 is not a number of workers"),
        ((), "parts has parts of a prediction - run"),
    ):
        done = predict(commands, place, tmp_path, *words)
        assert done.code == 2
        assert message in done.error_message
    assert contents(out, ".lock").keys() - {"part.json"} >= contents(parts).keys() - {f"{PARTS}/1-of-3/part.json"}
    empty = commands("merge", "nothing", cwd=tmp_path)
    assert "nothing has no parts to merge - give the folder" in empty.error_message


def evaluate(commands, place, cwd, *words, checkpoint="a.ckpt"):
    done = commands("evaluate", place / checkpoint, "--out", "out", *words, cwd=cwd)
    assert done.code == 0, done.err
    return done


def test_parts_of_an_evaluation_are_merged_to_the_report_of_one_process(place, commands, tmp_path):
    words = ("--masks", "masks", "--pictures", "pictures", "--compare", place / "b.ckpt", "--flip")
    folders = [tmp_path / name for name in ("one", "parts")]
    for folder in folders:
        folder.mkdir()
    one = evaluate(commands, place, folders[0], *words)
    for index in (2, 3, 1):
        evaluate(commands, place, folders[1], *words, f"--shard={index}/3")
    merged = commands("merge", "out", cwd=folders[1])
    assert merged.code == 0, merged.err
    assert merged.out == one.out
    found = [
        {name: value for name, value in contents(folder).items() if ".segdeconv" not in name} for folder in folders
    ]
    assert {"out/report.json", "out/report.html"} < set(found[0])
    assert found[0] == found[1]
    assert json.loads((folders[1] / "out" / "report.json").read_text())["num_images"] == 7


@pytest.fixture(scope="module")
def evaluated(place, commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    for index in (1, 2):
        evaluate(commands, place, folder, "--shard", f"{index}/2")
    return folder / "out"


def _damage_counts(out):
    (out / PARTS / "2-of-2" / "evaluation.npz").write_bytes(b"PK damaged")


def _repeat_part(out):
    shutil.copy(out / PARTS / "1-of-2" / "evaluation.npz", out / PARTS / "2-of-2" / "evaluation.npz")


def _remove_counts(out):
    (out / PARTS / "2-of-2" / "evaluation.npz").unlink()


def _change_words(out):
    _change_recorded(out, 2, lambda summary: summary["arguments"].append("--flip"))


def _change_data(out):
    for index in (1, 2):
        _change_recorded(out, index, lambda summary: summary["data"].update(images=8))


def _trust(out):
    for index in (1, 2):
        _change_recorded(out, index, lambda summary: summary.update(arguments="--trust=os.system"))


def _change_recorded(out, index, change):
    path = out / PARTS / f"{index}-of-2" / "part.json"
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_damage_counts, "evaluation.npz is not a part of this evaluation"),
        (_repeat_part, "evaluation.npz is not a part of this evaluation"),
        (_remove_counts, "evaluation.npz is missing - evaluate this part again"),
        (_change_words, "part 2/2 was evaluated with other settings than part 1/2"),
        (_change_data, "part 1/2 was evaluated with other images - evaluate all parts again"),
        (_trust, "part 1/2 does not have the arguments of its evaluation"),
    ],
)
def test_a_merge_of_wrong_parts_of_an_evaluation_is_refused(evaluated, commands, tmp_path, change, message):
    out = shutil.copytree(evaluated, tmp_path / "out")
    change(out)
    done = commands("merge", "out", cwd=tmp_path)
    assert done.code == 2
    assert message in done.error_message
    assert not (out / "report.json").exists()


def test_parts_are_disjoint_and_cover_everything():
    for count in (1, 3, 8):
        selected = [Part(index, count).select(range(7)) for index in range(1, count + 1)]
        assert sorted(item for part in selected for item in part) == list(range(7))
        assert max(map(len, selected)) - min(map(len, selected)) <= 1


def test_without_ray_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--engine ray needs ray, which is not installed - pip install 'segdeconv\[ray"
    ):
        distributed.require_ray()


def test_chunks_have_every_item_once_and_each_worker_several():
    for count in (1, 7, 50, 5000):
        chunks = distributed.chunks_of(range(count), 4)
        assert [item for chunk in chunks for item in chunk] == list(range(count))
        assert len(chunks) >= min(count, 16)
        assert max(map(len, chunks)) <= distributed.MAX_CHUNK
