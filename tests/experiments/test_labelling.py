"""The study of labelling by rank, on a few tiny images."""

import json

import fakes
import pytest

from segdeconv.experiments.study import labelling

TINY = {
    "dataset__size": [32, 32], "model__stages": [[4], [8]], "model__encoder_addition": False,
    "trainer__max_steps": 1, "trainer__recalibration_batches": 0,
}  # fmt: skip


@pytest.mark.slow
def test_methods_start_from_the_same_images_and_label_others_of_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labelling, "STEPS", (4, 6))
    root = fakes.camvid(tmp_path / "camvid", num=8)
    labelling.run(tmp_path / "out", root, seeds=(0,), methods=("random", "rank"), **TINY)

    def images(method, count):
        lines = (labelling.folder(tmp_path / "out", 0, method, count) / "data" / "train.txt").read_text().splitlines()
        return {line.split()[0] for line in lines}

    for method in ("random", "rank"):
        assert len(images(method, 4)) == 4
        assert len(images(method, 6)) == 6
        assert images("random", 4) < images(method, 6)
    table = json.loads((tmp_path / "out" / "labelling.json").read_text())["rows"]
    assert [len(row["runs"]) for row in table] == [1, 1, 1, 1, 1, 0]
    report = json.loads((tmp_path / "out" / "seed0" / "rank" / "006" / "report.json").read_text())
    assert table[3]["mean"]["val"] == pytest.approx(100 * report["miou"])
    assert table[3]["runs"]["seed0"].keys() == {"val", "others", "pool", "train"}
    capsys.readouterr()
    labelling.run(tmp_path / "out", root, seeds=(0,), methods=("random", "rank"), **TINY)
    assert "===" not in capsys.readouterr().out  # all runs are finished
