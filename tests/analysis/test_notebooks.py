"""The notebooks run from top to bottom on a sweep folder, and say what they are for."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "analysis/notebooks"
SAYS = {
    "data_versus_architecture": (
        "Training on code instead of web raises loss",
        "quantity='tokens'",
    ),
    "nested_laws_and_refusals": ("description: ", "R-UNDER", "ln L differs by", "R-SEED"),
    "three_approaches": ("1, envelope of training curves", "W-A2BIAS", "-23.1"),
    "forecasts": ("gamma: ", "per decade"),
    "next_runs": ("more runs",),
    "counting_compute": ("At equal training FLOPs the architecture effect",),
    "chinchilla_replication": ("'alpha': 0.3473", "'beta': 0.3672"),
}


def test_every_notebook_is_executed_here():
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_the_stored_notebook_holds_no_output(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_runs_and_answers_its_question(name, sweep, request):
    own = {"sweep": str(sweep)}
    if name == "chinchilla_replication":
        request.getfixturevalue("chinchilla_rows")
        own = {"points_file": str(FOLDER.parents[2] / "shared/data/chinchilla_epoch245.csv")}
    printed = _printed(name, own)
    for needle in SAYS[name]:
        assert needle in printed


def test_the_replication_says_so_where_the_points_are_missing():
    assert "is not at hand" in _printed("chinchilla_replication", {"points_file": "none.csv"})


def _printed(name: str, own: dict[str, str]) -> str:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            values = "\n".join(f"{key} = {value!r}" for key, value in own.items())
            cell.source = f"from pathlib import Path\n\n{values}"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
