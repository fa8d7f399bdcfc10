"""docs/explore.ipynb as it stands, from the first cell to the last, on photos of a quarter of the size."""

import json

import pytest
from paths import ROOT

NOTEBOOK = ROOT / "docs" / "explore.ipynb"
SIZE, SMALLER = "--width 280 --height 210", "--width 140 --height 112"


def test_the_notebook_runs_without_a_network(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "stored without outputs: they would grow old"
    assert sum(cell.source.count(SIZE) for cell in cells) == 1
    for cell in cells:
        cell.source = cell.source.replace(SIZE, SMALLER)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    metrics = json.loads((tmp_path / "outputs" / "explore" / "tuned" / "metrics.json").read_text())["mean"]
    assert metrics["l1_after"] < metrics["l1_before"]  # fine-tuned for real, on what the room shows
