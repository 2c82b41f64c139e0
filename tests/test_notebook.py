"""The code cells of docs/notebook.ipynb run in a plain Python process, and the file stays small."""

import json
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "notebook.ipynb"
MAX_BYTES = 100_000  # with its outputs


def test_the_cells_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(DOCS / "pictures")
    names = {"__name__": "notebook"}
    monkeypatch.setitem(sys.modules, "notebook", type(sys)("notebook"))  # of the classes that the cells define
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile("".join(cell["source"]), f"cell {cell['execution_count']}", "exec"), names)
    assert names["prediction"].mask.shape == (216, 288)
    assert (tmp_path / "street.png").is_file()
    assert names["own"].scores["miou"] > 0.9
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert "building" in "".join(cells[0]["outputs"][0]["data"]["text/plain"])


def test_the_file_is_small_and_has_the_form_of_a_notebook():
    notebook = json.loads(NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert {"id", "metadata", "source", "cell_type"} <= set(cell)
        assert all(output["output_type"] == "execute_result" for output in cell.get("outputs", []))
