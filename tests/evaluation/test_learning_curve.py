"""The learning curve: values as in the file, lines at the positions worked by hand, damaged files refused."""

import math

import pytest

from segdeconv.evaluation.learning_curve import HEIGHT, MAX_POINTS, WIDTH, charts, curve_beside, read_curve
from segdeconv.system.plain_data import PlainDataError

HEAD = "step,epoch,lr,train/loss,train/miou,val/loss,val/miou,val/iou/a\n"


def written(folder, *rows):
    (folder / "metrics.csv").write_text(HEAD + "".join(f"{row}\n" for row in rows))
    return folder / "metrics.csv"


def test_the_lines_are_at_the_values_of_the_file(tmp_path):
    # The second epoch has no validation, the last row was truncated by a kill.
    rows = "4,0,0.1,2.0,0.1,1.0,0.25,0", "8,1,0.1,1.0,0.2,nan,nan,nan", "12,2,0,0.5,0.3,1.5,0.75,0", "16,3,0"
    curve = read_curve(written(tmp_path, *rows))
    assert (curve.epochs, curve.steps, curve.best) == ((1, 2, 3), (4, 8, 12), 2)
    assert curve.values["val/loss"] == (1.0, None, 1.5)
    loss, miou = charts(curve)
    assert [value for _, value in loss.y_ticks] == [0, 0.5, 1, 1.5, 2]
    assert loss.lines == {
        "train": [(0, 0), (WIDTH / 2, HEIGHT / 2), (WIDTH, 0.75 * HEIGHT)],
        "val": [(0, HEIGHT / 2), (WIDTH, 0.25 * HEIGHT)],
    }
    assert miou.lines == {"val": [(0, 0.75 * HEIGHT), (WIDTH, 0.25 * HEIGHT)]}
    assert loss.best == miou.best == WIDTH
    assert miou.x_ticks == [(0, 1), (WIDTH / 2, 2), (WIDTH, 3)]


def test_of_equal_epochs_the_first_is_the_best_as_for_the_checkpoint(tmp_path):
    path = written(tmp_path, *(f"{epoch},{epoch},0,1,0,1,{miou},0" for epoch, miou in enumerate((0.1, 0.5, 0.5, 0.2))))
    assert read_curve(path).best == 1


@pytest.mark.parametrize(
    "row",
    [f"9,0,0,{value},0,{value},{value},0" for value in ("nan", "inf", "-inf", "1e308", "-1e308", "5e-324", "0", "-3")],
)
def test_lines_of_extreme_values_are_finite(tmp_path, row):
    for chart in charts(read_curve(written(tmp_path, row, "10,1,0,1,0,1,0.5,0"))):
        numbers = [number for line in chart.lines.values() for point in line for number in point]
        assert all(map(math.isfinite, [*numbers, *(y for y, _ in chart.y_ticks)]))
        assert 2 <= len(chart.y_ticks) <= 8


def test_a_long_run_is_drawn_with_few_points_up_to_its_last_epoch(tmp_path):
    rows = (f"{epoch},{epoch},0,{1 / (epoch + 1)},0,1,0.5,0" for epoch in range(10 * MAX_POINTS + 1))
    loss, _ = charts(read_curve(written(tmp_path, *rows)))
    assert MAX_POINTS / 2 < len(loss.lines["train"]) <= MAX_POINTS
    assert loss.lines["train"][-1][0] == WIDTH


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        HEAD + "x,0,0,1,0,1,1,0\n",
        HEAD + f"1,{'9' * 30},0,1,0,1,1,0\n",
        HEAD + "1,0,0,<b>,0,1,1,0\n",
        "\xff",
    ],
)
def test_a_damaged_file_is_refused_and_costs_only_the_curve(tmp_path, capsys, text):
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlainDataError, match="is not a table of metrics"):
        read_curve(path)
    assert curve_beside(tmp_path / "best.ckpt") is None
    assert f"{path} is not a table of metrics, so the report has no learning curve" in capsys.readouterr().err


def test_without_epochs_there_is_no_curve(tmp_path):
    assert curve_beside(tmp_path / "best.ckpt") is None
    assert read_curve(written(tmp_path)) is None
